"""Local files: walk them, hash them, put a directory in place as a whole."""
