"""Demonstrations of a robot's task: episodes, the chunks cut from them, and what normalises them."""
