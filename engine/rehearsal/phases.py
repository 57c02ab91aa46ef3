"""The phases of a rehearsed iteration, by the names of its counts."""

BUILD, PREFILL, DECODE = "build", "rollout: prefill", "rollout: decode"
INFERENCE, ADVANTAGES, ACTOR, CRITIC = "inference", "advantages", "update: actor", "update: critic"
PHASES = (BUILD, PREFILL, DECODE, INFERENCE, ADVANTAGES, ACTOR, CRITIC)
