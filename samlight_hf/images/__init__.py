"""Reading of images, and preprocessing to pixel values for the model."""
