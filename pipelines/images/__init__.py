"""From an image source to a sorted listing and to pixels."""
