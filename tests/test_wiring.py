from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import nadhooks

from .nets import Line, Pair, Split, images, seeded, vectors


def edges(model: nn.Module, sites: object, example: Tensor) -> set[tuple[str, str]]:
    with nadhooks.attach(model, sites, example=example) as gates:  # type: ignore[arg-type]
        return set(gates.wiring.edges)


def test_a_line_is_a_line_through_in_place_layers() -> None:
    found = edges(seeded(Line), ["conv1", "act1", "act2"], images())
    assert found == {("input", "conv1"), ("conv1", "act1"), ("act1", "act2"), ("act2", "output")}


def test_branches_and_shortcuts_are_edges_of_their_own() -> None:
    found = edges(seeded(Split), ["stem", "left", "right", "join"], vectors())
    assert found == {
        ("input", "stem"),
        ("stem", "left"),
        ("stem", "right"),
        ("stem", "join"),
        ("left", "join"),
        ("right", "join"),
        ("join", "output"),
    }


def test_sites_between_cut_the_path() -> None:
    assert ("stem", "join") not in edges(seeded(Line), ["conv1", "act1", "head"], images())
    assert edges(seeded(Split), ["stem", "join"], vectors()) == {
        ("input", "stem"),
        ("stem", "join"),
        ("join", "output"),
    }


def test_leaves_of_one_module_are_wired_apart() -> None:
    found = edges(seeded(Pair), "both", vectors())
    assert found == {("input", "both[0]"), ("input", "both[1]"), ("both[0]", "output"), ("both[1]", "output")}


def test_frozen_weights_and_no_grad_do_not_hide_the_wiring() -> None:
    model = seeded(Split)
    model.requires_grad_(False)
    with torch.no_grad():
        assert len(edges(model, ["stem", "left", "right", "join"], vectors())) == 7


def test_a_module_called_twice_keeps_the_graph_acyclic() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))

    with nadhooks.attach(Twice().double(), ["a", "b"], example=vectors()) as gates:
        assert nx.is_directed_acyclic_graph(gates.wiring)
        assert set(gates.wiring.edges) == {("input", "a"), ("a", "b"), ("a", "output"), ("b", "output")}


def test_wiring_is_frozen_ordered_and_says_how_it_was_found() -> None:
    with nadhooks.attach(seeded(Split), ["stem", "left", "right", "join"], example=vectors()) as gates:
        assert list(gates.wiring) == ["input", "stem", "left", "right", "join", "output"]
        assert {data["found"] for _, _, data in gates.wiring.edges(data=True)} == {"autograd"}
        with pytest.raises(nx.NetworkXError):
            gates.wiring.add_edge("input", "output")


def test_gradients_and_weights_are_untouched() -> None:
    model = seeded(Line)
    edges(model, "conv1", images())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Sliced(nn.Module):
    """Concatenates what two layers put out, and takes the first one's part again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.c(both[:, :4]) + both[:, 4:]


class Hard(nn.Module):
    """Chooses by what `a` puts out, which no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.where(self.a(x).detach() > 0, x, -x))


class Branches(nn.Module):
    """Puts out three tensors, of which one leads nowhere, and one does not come from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.both = BranchesInside()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        live, _, constant = self.both(x)
        return self.head(live + constant)


class BranchesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead, self.constant = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.live(x), self.dead(x), self.constant(torch.ones_like(x))


def test_slices_of_a_concatenation_are_kept_apart() -> None:
    expected = {("input", "a"), ("input", "b"), ("a", "c"), ("b", "output"), ("c", "output")}
    assert edges(seeded(Sliced), ["a", "b", "c"], vectors()) == expected


def test_a_branch_that_starts_at_zero_is_not_taken_for_a_slice() -> None:
    model = seeded(Sliced)
    with torch.no_grad():
        model.c.weight.zero_()
        model.c.bias.zero_()
    assert ("c", "output") in edges(model, ["a", "b", "c"], vectors())
    assert not model.c.weight.any()


def test_what_no_gradient_passes_is_found_by_perturbation() -> None:
    with nadhooks.attach(seeded(Hard), ["a", "b"], example=vectors()) as gates:
        assert gates.wiring["a"]["b"]["found"] == "perturbation"
        assert gates.wiring["input"]["b"]["found"] == "autograd"
        assert set(gates.wiring.edges) == {("input", "a"), ("a", "b"), ("input", "b"), ("b", "output")}


def test_sites_off_the_way_from_input_to_output_are_left_out_and_reported() -> None:
    with nadhooks.attach(seeded(Branches), "both", example=vectors()) as gates:
        assert [site.name for site in gates.sites] == ["both[0]"]
        assert gates.skipped == {
            "both[1]": "it leads nowhere: no output depends on it",
            "both[2]": "nothing of the input reaches it",
        }
        assert list(gates.wiring) == ["input", "both[0]", "output"]
    with pytest.raises(nadhooks.NadhooksError, match="leads nowhere"):
        nadhooks.attach(seeded(Branches), "both.dead", example=vectors())


def test_the_second_opinion_agrees_adds_and_refutes() -> None:
    with nadhooks.attach(seeded(Split), ["stem", "left", "right", "join"], example=vectors()) as gates:
        before = set(gates.wiring.edges)
        assert set(gates.rewire(vectors()).edges) == before
        wrong = nx.DiGraph(gates.wiring)
        wrong.remove_edge("stem", "left")
        wrong.add_edge("left", "right", found="autograd")
        gates.wiring = wrong
        assert set(gates.rewire(vectors()).edges) == before
        assert gates.wiring["stem"]["left"]["found"] == "perturbation"


def test_the_second_opinion_sees_through_closed_gates_and_leaves_the_model_alone() -> None:
    model = seeded(Split)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with nadhooks.attach(model, ["stem", "left"], example=vectors()) as gates:
        with gates.close("left", range(6)):
            assert ("left", "output") in gates.rewire(vectors()).edges
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_detector_that_finds_nothing_keeps_its_sites() -> None:
    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return y if y.amax() > 1e9 else x.new_zeros(0, 4)

    with nadhooks.attach(seeded(Finds), ["a", "b"], example=vectors()) as gates:
        assert gates.wiring["b"]["output"]["found"] == "assumed"


def test_wiring_on_the_meta_device_needs_no_values() -> None:
    with torch.device("meta"):
        model = Split()
    with nadhooks.attach(model, ["stem", "left"], example=torch.empty(2, 4, device="meta")) as gates:
        assert set(gates.wiring.edges) == {("input", "stem"), ("stem", "left"), ("stem", "output"), ("left", "output")}
        with pytest.raises(nadhooks.NadhooksError, match="meta device"):
            gates.rewire(torch.empty(2, 4, device="meta"))


def test_perturbation_runs_a_layer_only_where_it_takes_in_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(2, 3)
    runs: list[nn.Module] = []
    forward = nn.Linear.forward

    def counted(layer: nn.Linear, input: Tensor) -> Tensor:
        runs.append(layer)
        return forward(layer, input)

    with nadhooks.attach(model, nadhooks.sites.channels(), example=x) as gates:
        monkeypatch.setattr(nn.Linear, "forward", counted)
        found = set(nadhooks.wiring.perturb(model, gates.sites, x).edges)
    assert found == {("input", "0"), ("0", "1"), ("1", "2"), ("2", "output")}
    assert runs == [*model, *model]  # all once, and each once more when what comes before it was changed
    assert not any("forward" in vars(layer) for layer in model)


def test_layers_that_share_a_weight_are_sites_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    model[2].weight = model[0].weight
    with nadhooks.attach(model, nadhooks.sites.channels(), example=vectors().float()) as gates:
        assert [(site.name, site.within) for site in gates.sites] == [("0", None), ("2", None), ("4", None)]
        assert set(gates.wiring.edges) == {("input", "0"), ("0", "2"), ("2", "4"), ("4", "output")}


class Captioned(nn.Module):
    """Takes tokens, and an image."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.text, self.image = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        seen = 0 if image is None else self.image(image)
        return self.text(self.words(ids)[:, 0]) + seen


@pytest.mark.parametrize("ids", [torch.arange(7)[None], torch.zeros(1, 7, dtype=torch.long), torch.tensor([[3]])])
def test_tokens_are_an_input_alone_and_beside_an_image(ids: Tensor) -> None:
    model = Captioned().eval()
    with nadhooks.attach(model, "text", example=ids) as gates:
        assert set(gates.wiring.edges) == {("input", "text"), ("text", "output")}
    with nadhooks.attach(model, ["text", "image"], example=(ids, torch.randn(1, 6))) as gates:
        ways = [(("input", name), (name, "output")) for name in ("text", "image")]
        assert set(gates.wiring.edges) == {*ways[0], *ways[1]}


def test_models_that_call_themselves_have_sites() -> None:
    class Both(nn.Module):
        """The mean over an input and its mirror image."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, mirrored: bool = True) -> Tensor:
            if mirrored:
                return self(x, False) + self(x.flip(1), False)
            return self.second(self.first(x).relu())

    model = nn.Sequential(Both()).eval()
    assert edges(model, "0", vectors().float()) == {("input", "0"), ("0", "output")}


def test_a_dry_run_changes_no_buffer_of_a_parametrization() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 3)).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    nadhooks.attach(model, nadhooks.sites.channels(), example=vectors().float()).detach()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
