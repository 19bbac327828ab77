"""What messages say of one thing and of several."""

import pytest

from sdxl_trainer.data import findings
from sdxl_trainer.data.sources import dataset, folder, shards, tree
from sdxl_trainer.errors import plural, sentence


def test_one_and_several() -> None:
    assert [plural(n, "picture") for n in (0, 1, 2, 1234)] == [
        "0 pictures",
        "1 picture",
        "2 pictures",
        "1,234 pictures",
    ]
    assert plural(1, "pass", "passes") == "1 pass"
    assert sentence(2, "pictures have no mask") == "2 pictures have no mask"
    assert sentence(1, "pictures have no mask") == "1 picture has no mask"
    assert sentence(1, "JSON files beside pictures cannot be read") == "1 JSON file beside pictures cannot be read"
    assert sentence(1, "metadata rows name more than one picture") == "1 metadata row names more than one picture"


SAID = [what for table in (dataset, folder, shards) for what, _ in table.PROBLEMS.values()]
SAID += [what for what, _ in tree.REFUSED.values()] + [f"captions {check[1]}" for check in findings.CHECKS]


@pytest.mark.parametrize("what", SAID)
def test_every_problem_can_be_told_of_one(what: str) -> None:
    one, several = sentence(1, what).split(), sentence(2, what).split()
    changed = [(a, b) for a, b in zip(several[1:], one[1:], strict=True) if a != b]
    assert changed[0][0] == changed[0][1] + "s", "the first noun stands for one"
    verbs = {"are": "is", "were": "was", "have": "has", "do": "does"}
    assert [verbs.get(a, a + "s") for a, _ in changed[1:]] == [b for _, b in changed[1:]]
    assert len(changed) == 2 or "cannot" in several
