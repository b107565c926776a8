"""Objects in an S3 endpoint or a plain directory: names, manifests, verified transfers. Below node and controller."""
