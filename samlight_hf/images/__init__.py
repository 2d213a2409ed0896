"""Images from files, and as pixel values for the model."""
