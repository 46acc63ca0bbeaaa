"""Convert texts to token windows. Each has a stamp that says which published figures it is comparable with."""
