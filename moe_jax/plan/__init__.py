"""What a study would need on hardware that is not here: whether the step fits, what it sends, what it costs."""
