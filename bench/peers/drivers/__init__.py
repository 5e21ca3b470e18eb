"""One program for each contender, run by that contender's own Python: the standard library and the contender only."""
