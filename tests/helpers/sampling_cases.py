"""What the tests of sample_tokens share: settings by row, allowed ids, and the draw of a row in fp64."""

from dataclasses import dataclass

import torch

from icegrt.kernels.sample_tokens.reference import exponential_noise, row_keys

DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
}
# Numbers of fp32, so that a tensor contains the same.
ROWS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5, "seed": 4},
    {"temperature": 0.75, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "seed": -7},
    {"temperature": 1.5, "top_k": 0, "top_p": 0.75, "min_p": 0.0, "seed": 1 << 40},
    {"temperature": 1.25, "top_k": 0, "top_p": 1.0, "min_p": 0.125, "seed": 5},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.875, "min_p": 0.0625, "seed": 6},
    {"temperature": 0.5, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "seed": 7},
    {"temperature": 1.0, "top_k": 1000, "top_p": 1.0, "min_p": 1.0, "seed": 8},
    {"temperature": 4.0, "top_k": 2, "top_p": 0.25, "min_p": 0.0, "seed": 9},
]


def by_row(rows, names=tuple(DTYPES)):
    """Return settings as tensors, one entry for each row."""
    return {name: torch.tensor([row[name] for row in rows], dtype=DTYPES[name]) for name in names}


def bitmask(allowed_NV):
    """Return booleans of ids as words of 32 bits."""
    rows, vocabulary = allowed_NV.shape
    bits = torch.zeros(rows, -(-vocabulary // 32) * 32, dtype=torch.int64)
    bits[:, :vocabulary] = allowed_NV
    return (bits.view(rows, -1, 32) << torch.arange(32)).sum(-1).to(torch.int32)


def drawn_ids(rows, vocabulary, share=0.5, seed=0):
    """Return whether each id is allowed: about a share of them, and at least one in every row."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(rows, vocabulary, generator=generator) < share
    allowed[torch.arange(rows), torch.randint(0, vocabulary, (rows,), generator=generator)] = True
    return allowed


@dataclass
class ExactDraw:
    """A row's draw in fp64.

    Attributes:
        token: its id.
        logprob: in the distribution that it was drawn from.
        lead: how far its perturbed logit is ahead of the next one.
        slack: the least difference between a mass or a ratio of probabilities and the limit that it was compared with.
    """

    token: int
    logprob: float
    lead: float
    slack: float


def exact_draw(logits_V, row, sequence_id, position, allowed_V=None):
    """Draw one row with fp64 numbers, a sort in Python and the noise of the reference."""
    z = logits_V.double()
    if allowed_V is not None:
        z = z.masked_fill(~allowed_V, -torch.inf)
    if row["temperature"] == 0:
        token = int(z.argmax())
        return ExactDraw(token, float(z.log_softmax(-1)[token]), 1.0, 1.0)
    z, slack = z / row["temperature"], 1.0
    kept = sorted((id for id in range(len(z)) if z[id] > -torch.inf), key=lambda id: (-float(z[id]), id))
    if row["top_k"]:
        kept = kept[: row["top_k"]]
    if row["top_p"] < 1:
        mass = torch.softmax(z[kept], -1)
        before = mass.cumsum(-1) - mass
        slack = float((before - row["top_p"]).abs().min())
        kept = [id for id, share in zip(kept, before.tolist(), strict=True) if share < row["top_p"]]
    if row["min_p"] > 0:
        ratio = torch.exp(z[kept] - z[kept[0]])
        slack = min(slack, *((ratio - row["min_p"])[1:].abs().tolist() or [1.0]), 1.0)
        kept = [id for id, share in zip(kept, ratio.tolist(), strict=True) if share >= row["min_p"]]
    coordinates = (torch.tensor([sequence_id]), torch.tensor([position]))
    noise = exponential_noise(row_keys(row["seed"], *coordinates), 0, len(z))[0].double().log()
    perturbed = z[kept] - noise[kept]
    order = perturbed.sort(descending=True).values
    best = int(perturbed.argmax())
    lead = float(order[0] - order[1]) if len(kept) > 1 else 1.0
    return ExactDraw(kept[best], float(z[kept].log_softmax(-1)[best]), lead, slack)
