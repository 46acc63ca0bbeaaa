"""Tables that are generated, and links between the repository and the site."""
