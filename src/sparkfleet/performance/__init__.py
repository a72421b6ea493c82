"""How fast engines are: the loads of a benchmark, its records, what they say against each other, and the search for
better settings."""
