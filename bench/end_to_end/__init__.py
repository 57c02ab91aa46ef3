"""Whole PPO iterations of icegrt, of the reference path and of peers on the same workloads, each in its own process."""
