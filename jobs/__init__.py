"""What a person types and a cluster runs."""
