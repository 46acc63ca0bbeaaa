"""Set up the jobs of a sweep, and report those that failed."""
