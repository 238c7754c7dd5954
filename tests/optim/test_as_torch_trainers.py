"""Real trainers drive the torch adapter, each compared with torch.optim in the same run."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fallline as fl

pytestmark = [
    # Lightning asks torch's trees in a way that torch has given up.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = torch.sin(X.sum(1, keepdim=True))
OPTIMIZERS = {
    "adam": (fl.optim.adam(0.02, weight_decay=0.01), lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.01)),
    "sgd": (fl.optim.sgd(0.05, 0.9), lambda p: torch.optim.SGD(p, 0.05, 0.9)),
}


def close(mine, theirs):
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.fixture(scope="module")
def lightning():
    return importlib.import_module("lightning.pytorch")  # slow to import


def lightning_run(lightning, make, folder, *, epochs=2, resume=None):
    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = body()

        def training_step(self, batch, _):
            x, y = batch
            return ((self.body(x) - y) ** 2).mean()

        def configure_optimizers(self):
            optimizer = make(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    model = Model()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=8), ckpt_path=resume, weights_only=False)
    return trainer, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning_trains_the_same_with_ours(lightning, name, tmp_path):
    ours, theirs = OPTIMIZERS[name]
    trainer, mine = lightning_run(lightning, ours.as_torch, tmp_path)
    close(mine, lightning_run(lightning, theirs, tmp_path)[1])
    assert isinstance(trainer.optimizers[0], torch.optim.Optimizer)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(ours.numbers["lr"] / 4)
    for p, start in zip(mine, body().parameters(), strict=True):
        assert (p != start).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning_resumes_from_its_checkpoint_bit_for_bit(lightning, name, tmp_path):
    make = OPTIMIZERS[name][0].as_torch
    _, through = lightning_run(lightning, make, tmp_path, epochs=3)
    trainer, _ = lightning_run(lightning, make, tmp_path, epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = lightning_run(lightning, make, tmp_path, epochs=3, resume=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed, through, strict=True))


def test_lightning_gives_sam_its_closure(lightning, tmp_path):
    _, mine = lightning_run(lightning, fl.optim.sam(fl.optim.sgd(0.05), rho=0.1).as_torch, tmp_path)
    _, plain = lightning_run(lightning, fl.optim.sgd(0.05).as_torch, tmp_path)
    assert all((a != b).any() for a, b in zip(mine, plain, strict=True))


class Rows(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "labels": Y[index]}


class Regression(nn.Module):
    """As transformers' Trainer expects one: it computes its own loss."""

    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x, labels=None):
        prediction = self.body(x)
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


@pytest.fixture(scope="module")
def transformers():
    return importlib.import_module("transformers")


def transformers_run(transformers, make, folder, model, data, *, epochs=2, resume=None, save="no"):
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        save_strategy=save,
        logging_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.5,
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_transformers_trains_the_same_with_ours(transformers, name, tmp_path):
    ours, theirs = OPTIMIZERS[name]
    mine = transformers_run(transformers, ours.as_torch, tmp_path / "a", Regression(), Rows())
    close(mine, transformers_run(transformers, theirs, tmp_path / "b", Regression(), Rows()))
    for p, start in zip(mine, body().parameters(), strict=True):
        assert (p != start).all()


def test_transformers_resumes_from_its_checkpoint_bit_for_bit(transformers, tmp_path):
    make = OPTIMIZERS["adam"][0].as_torch
    through = transformers_run(transformers, make, tmp_path, Regression(), Rows(), save="epoch")
    resumed = transformers_run(
        transformers, make, tmp_path, Regression(), Rows(), resume=str(tmp_path / "checkpoint-3")
    )
    assert all(torch.equal(a, b) for a, b in zip(resumed, through, strict=True))


class Texts(Dataset):
    tokens = torch.randint(0, 20, (24, 6), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def test_transformers_trains_a_small_gpt_the_same_with_ours(transformers, tmp_path):
    def model():
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        # In float64: the gradient of a key's bias is nothing but round-off, which Adam enlarges.
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still)).double()

    ours, theirs = fl.optim.adamw(0.001), lambda p: torch.optim.AdamW(p, 0.001)
    mine = transformers_run(transformers, ours.as_torch, tmp_path / "a", model(), Texts())
    reference = transformers_run(transformers, theirs, tmp_path / "b", model(), Texts())
    close(mine, reference)
