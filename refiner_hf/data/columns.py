"""The columns that all data have here, whatever they are called where they come from."""

IMAGE_COLUMN, LABEL_COLUMN = "image", "labels"
CONTENT_COLUMN = "content"  # a number for what is in the image's file, where it was needed
