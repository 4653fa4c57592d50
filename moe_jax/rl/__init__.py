"""Reinforcement learning under noise: tasks with verifiable rewards, sampling, advantages and losses, and the loop that joins them."""
