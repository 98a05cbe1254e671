"""The page that compares SPConv with its peers: layers, networks, accuracy, pictures. See ``__main__``."""
