"""Commands: absl flags to a config to one library call."""
