"""Calls of functions and reasoning, read off the text of a model; how the text is cut into pieces changes nothing."""
