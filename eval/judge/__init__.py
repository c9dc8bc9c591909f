"""A model judges answers: what it is asked, how far it agrees with people, what its replies add up to."""
