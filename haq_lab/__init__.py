"""How far can a large language model be squeezed onto one edge GPU, and at what price?"""
