"""Search: the space, the sampler, Ray Tune, and what comes out of a sweep."""
