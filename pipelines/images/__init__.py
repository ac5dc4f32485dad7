"""Image sources: a sorted listing of their images, and pixels."""
