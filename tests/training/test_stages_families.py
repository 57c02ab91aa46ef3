"""Every command runs on a tiny model of every family, and what comes out is what transformers loads."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from icegrt import cli
from tests.helpers import stage_cases as cases

FAMILIES = {
    "mistral": {"sliding_window": 12},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1},
    "llama": {
        "vocab_size": 67,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
SHORT = "sampling.max_new_tokens=4"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages_of_a_family(family, tmp_path):
    home = cases.make_home(tmp_path / "home", family=family, **FAMILIES[family])
    out = tmp_path / "out"

    def run(command, *keys):
        assert cli.main([command, *keys]) == 0

    run("sft", *cases.sft_keys(home, out / "sft", "sft.batch_sequences=8"))
    arguments = [f"sample.model={out}/sft", f"sample.prompts={home.prompts}", f"sample.out={out}/answers.jsonl"]
    run(
        "sample", *arguments, f"sample.score_function={home.function}", f"sample.{SHORT}", "sample.samples_per_prompt=2"
    )
    run("reward", *cases.reward_keys(home, out / "reward", f"reward.model={out}/sft/model", "reward.batch_prompts=8"))
    models = [f"ppo.actor={out}/sft/model", f"ppo.reward_model={out}/reward/model"]
    run("ppo", *cases.ppo_keys(home, out / "ppo", *models, "ppo.iterations=1", f"ppo.{SHORT}"))
    run("generate", f"generate.model={out}/ppo", "generate.prompt=hi", f"generate.{SHORT}")
    run("export", f"export.run={out}/ppo", f"export.out={out}/actor", "export.shard_gigabytes=1e-5")
    run("export", f"export.run={out}/ppo", f"export.out={out}/critic", "export.role=critic", "export.dtype=bf16")
    assert len(list((out / "actor").glob("*.safetensors"))) > 2
    for kind, name in ((AutoModelForCausalLM, "actor"), (AutoModelForSequenceClassification, "critic")):
        model, loading_info = kind.from_pretrained(out / name, output_loading_info=True)
        assert model.config.model_type == family
        assert not any(loading_info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (row,) = [r for r in cases.read_jsonl(out / "ppo" / "metrics.jsonl") if r["kind"] == "ppo"]
    assert row["rollout_logprob_gap_max"] < 1e-4
