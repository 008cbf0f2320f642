"""What the lessons share: a comparison that asserts, noise that unmasks bugs, a text to learn from, and a check
for exercises. Everything else a lesson builds itself, or imports from train_gpt2.py. The pictures are in figures.py."""
import sys
from pathlib import Path

import torch

assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9), f"PyTorch 2.9 or later, not {torch.__version__}"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `import train_gpt2` works wherever the notebook was started


def compare(name, ours, ref, atol):
    """Print the largest difference of two tensors (or numbers), and stop with an AssertionError if it is above atol.

    When the difference is exactly 0 it says so: usually the same operations in the same order.
    """
    ours, ref = (t.detach() if torch.is_tensor(t) else torch.tensor(t, dtype=torch.float64) for t in (ours, ref))
    assert ours.shape == ref.shape, f"{name}: shapes {tuple(ours.shape)} and {tuple(ref.shape)} differ"
    gap = (ours.double() - ref.double()).abs().max().item()
    print(f"{name:<40} largest difference {gap:.1e}" + (", exactly equal" if gap == 0 else f" (allowed {atol:.0e})"))
    assert gap <= atol, f"{name}: {gap:.3g} is more than {atol:.0e}"  # nan fails too


@torch.no_grad()
def shake(module, std=0.2, seed=1):
    """Add N(0, std) to every parameter, and return the module.

    Fresh biases are 0 and fresh gains are 1, so a forgotten bias or a misplaced gain changes nothing, and no
    comparison can see it. After a shake it can.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p += std * torch.randn(p.shape, generator=generator).to(p)
    return module


def corpus(file="input.txt"):
    """The text to learn from: your own `input.txt`, beside the notebook or in the top folder, or else Python's own.

    The built-in text (the Language Reference and the docstrings of the standard library, about 2 MB) is reduced
    to printable ASCII and line breaks, so that a vocabulary of characters stays small: 96 at most.
    """
    for path in (Path(file), ROOT / file):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    from fineweb import builtin_documents
    text = "\n\n".join(builtin_documents())
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def check(answer, name):
    """Try your answer to exercise `name` ("ex03_1"): prints "your turn" while it is still the stub, "right" when the
    check of solutions.py passes; a wrong answer stops with an AssertionError that says what differs."""
    import solutions
    try:
        getattr(solutions, f"check_{name}")(answer)
    except NotImplementedError:
        print(f"{name}: your turn")
    else:
        print(f"{name}: right")
