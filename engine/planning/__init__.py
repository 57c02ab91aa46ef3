"""Planning: the memory that a PPO run needs, and the changes of its configuration that make it fit."""
