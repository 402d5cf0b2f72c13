"""Search, training and storage of image classifiers; imports nothing from serve/."""
