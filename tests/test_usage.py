"""The one snippet works as it stands, and the README's loop makes the same calls."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch

from palf_dist.config import PolicyConfig
from palf_dist.policies import LearnedPolicy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, save_policy
from palf_dist.usage import usage

README = Path(__file__).parent.parent / "README.md"


def test_the_snippet_makes_a_step(tmp_path: Path) -> None:
    spec = policy_spec(PolicyConfig())
    mean, std = np.zeros(len(spec.features), np.float32), np.ones(len(spec.features), np.float32)
    policy = PolicyArtefact(spec, LearnedPolicy(spec, mean, std).initial(), mean, std)
    path = save_policy(tmp_path / 'a "b" \\ ü', policy)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "logits": model(torch.ones(4, 3)),
        "y": torch.tensor([0, 1, 1, 1]),
        "index": torch.arange(4),
    }
    exec(usage(path).replace("...", "10"), names)
    assert not torch.equal(model.weight, before)


def calls(code: str) -> list[tuple[str, int, list[str | None]]]:
    """Which method of what is called, with how many positional and which named arguments, in their order."""
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assign | ast.Expr)]
    made = [node.value for node in sorted(statements, key=lambda node: (node.lineno, node.col_offset))]
    return [
        (ast.unparse(call.func), len(call.args), [word.arg for word in call.keywords])
        for call in made
        if isinstance(call, ast.Call)
    ]


def test_the_readme_makes_the_same_calls() -> None:
    (snippet,) = (block.split("```")[0] for block in README.read_text().split("```python\n")[1:])
    assert calls(usage("runs/first/best")) == calls(snippet)[:-1]
    assert calls(snippet)[-1] == ("optimizer.zero_grad", 0, [])
