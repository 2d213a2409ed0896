import torch
from torch import nn

from samlight_hf.distillation.muon import BatchedMuon, MuonWithAdamW, orthogonalize


def make_model(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    parts = {
        "first": nn.Linear(48, 64),
        "patches": nn.Conv2d(3, 40, 4),
        "token": nn.Embedding(4, 48),
        "last": nn.Linear(64, 32),
    }
    return nn.ModuleDict(parts)


def set_gradients(model: nn.Module, step: int):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def groups(model: nn.Module) -> list[dict]:
    """The groups of parameters that Trainer creates."""
    decayed = [parameter for name, parameter in model.named_parameters() if "bias" not in name]
    plain = [parameter for name, parameter in model.named_parameters() if "bias" in name]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def test_matrices_go_the_way_of_muon_and_everything_else_that_of_adamw():
    model, expected = make_model(), make_model()
    optimizer = MuonWithAdamW(groups(model), lr=0.01, betas=(0.9, 0.98))
    matrices = [expected["first"].weight, expected["last"].weight]
    biases = [expected[name].bias for name in ("first", "patches", "last")]
    parts = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [expected["patches"].weight, expected["token"].weight], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1
        ),
        torch.optim.AdamW(biases, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0),
    ]  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(4):
        for one in (model, expected):
            set_gradients(one, step)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = 0.01 / (step + 1)
            part.step()
        optimizer.step()
        schedule.step()
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=name)
    assert not torch.equal(model["first"].weight, make_model()["first"].weight)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_matrices_of_one_shape_go_together_the_way_each_goes_alone(monkeypatch):
    shapes = [(48, 64), (64, 48), (48, 64), (32, 32), (64, 48), (48, 64)]
    sizes = []

    def counted(matrices, *settings):
        sizes.append(tuple(matrices.shape))
        return orthogonalize(matrices, *settings)

    monkeypatch.setattr("samlight_hf.distillation.muon.orthogonalize", counted)
    generator = torch.Generator().manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    options = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours, torchs = BatchedMuon(mine, **options), torch.optim.Muon(theirs, **options)
    for step in range(4):
        for left, right in zip(mine, theirs):
            left.grad = right.grad = torch.randn(left.shape, generator=generator)
        mine[3].grad = theirs[3].grad = None if step == 2 else mine[3].grad
        before = [parameter.detach().clone() for parameter in theirs]
        ours.step()
        torchs.step()
        for old, left, right in zip(before, mine, theirs):
            # A bfloat16 has 8 bits, and each iteration uses rounded products.
            assert (left - right).norm() <= 0.02 * (right - old).norm()
            right.data.copy_(left)
    assert sizes[:3] == [(3, 48, 64), (2, 64, 48), (1, 32, 32)] and len(sizes) == 11
    assert ours.state_dict()["state"].keys() == torchs.state_dict()["state"].keys()


def test_the_optimizer_takes_matrices_together():
    assert isinstance(MuonWithAdamW(groups(make_model())).parts[0], BatchedMuon)


def test_going_on_from_its_state_is_bit_exact():
    whole, model = make_model(), make_model()
    optimizer = MuonWithAdamW(groups(whole), lr=0.01)
    for step in range(6):
        set_gradients(whole, step)
        optimizer.step()
    first = MuonWithAdamW(groups(model), lr=0.01)
    for step in range(3):
        set_gradients(model, step)
        first.step()
    resumed = MuonWithAdamW(groups(model), lr=0.5)
    resumed.load_state_dict(first.state_dict())
    assert {group["lr"] for group in resumed.param_groups} == {0.01}
    for step in range(3, 6):
        set_gradients(model, step)
        resumed.step()
    for mine, theirs in zip(model.parameters(), whole.parameters()):
        assert torch.equal(mine, theirs)
    for group in resumed.param_groups:
        group["lr"] = 0.0
    before = [parameter.clone() for parameter in model.parameters()]
    resumed.step()  # the parts still have the same groups
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
