"""Where rewards come from besides the reward model: users' functions, in worker processes or in this one, and HTTP.

Imports nothing heavy: a worker process that scores with a plain function starts in a tenth of a second.
"""
