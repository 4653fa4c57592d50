"""The optimizer: `plan` gives each parameter its rule from its declared role, `muon` is the rule for matrices, `schedules` the rates."""
