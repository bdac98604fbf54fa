"""The trainers: a resumed run is the same run, latents are normalised without changing the autoencoder's meaning."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from s2q.common.seeds import derive_seed
from s2q.shapes.embedded import embedded_folder, embedded_pipeline
from s2q.shapes.scenes import combinations
from training.architecture import build_pipeline, build_tokenizer
from training.assemble import write_card
from training.cogvideox import ShapesCogVideoX
from training.image_to_video import ImageToVideoTask, ShapesWanImageToVideo
from training.loop import TrainingSettings, build_optimizers, learning_rate_factor, load_average, train
from training.quality import sample
from training.transformer import TransformerTask, encode_pool
from training.vae import TaughtVAETask, VAETask, normalise_latents
from training.videos import sample_batch
from training.wan import PIPELINE_TEXT_TOKENS, ShapesWan

COGVIDEOX, WAN, IMAGE = ShapesCogVideoX(), ShapesWan(), ShapesWanImageToVideo()


class LineTask:
    """Fit a line with a tiny network: seconds instead of hours, the same loop."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.modules = nn.ModuleDict({"network": self.network})

    def loss(self, batch_size, generator):
        x = torch.randn(batch_size, 4, generator=generator)
        return (self.network(x) - x.sum(1, keepdim=True)).square().mean(), {}


def _settings(**changes):
    base = {"steps": 12, "batch_size": 16, "learning_rate": 0.02, "warmup_steps": 2, "muon": True}
    return TrainingSettings(**base | {"checkpoint_every": 4, "log_every": 4} | changes)


class KilledError(Exception):
    """The run was cut off."""


class CutOffTask(LineTask):
    """Dies in its tenth batch, after the checkpoint of step 8."""

    batches = 0

    def loss(self, batch_size, generator):
        self.batches += 1
        if self.batches == 10:
            raise KilledError
        return super().loss(batch_size, generator)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    train(LineTask, _settings(), tmp_path / "whole")
    with pytest.raises(KilledError):
        train(CutOffTask, _settings(), tmp_path / "cut")
    assert int(load_file(tmp_path / "cut" / "state.safetensors")["step"]) == 8
    train(LineTask, _settings(), tmp_path / "cut")
    whole, resumed = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_training_lowers_the_loss(tmp_path):
    train(LineTask, _settings(steps=120), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.3 * losses[0]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    train(LineTask, _settings(steps=4), tmp_path)
    with pytest.raises(ValueError, match="use another folder"):
        train(LineTask, _settings(steps=8), tmp_path)


def test_a_finished_run_is_left_alone(tmp_path):
    train(LineTask, _settings(steps=4), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(LineTask, _settings(steps=4), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class BothHalvesTask(LineTask):
    """In one process, the batches that two processes draw."""

    step = 0

    def loss(self, batch_size, generator):
        halves = [torch.Generator().manual_seed(derive_seed(0, "step", self.step, rank)) for rank in range(2)]
        self.step += 1
        return sum(super(BothHalvesTask, self).loss(batch_size // 2, half)[0] for half in halves) / 2, {}


@pytest.mark.slow
def test_two_processes_train_as_one_with_both_batches(tmp_path):
    settings = _settings(steps=3, muon=False)
    train(LineTask, settings, tmp_path / "two", processes=2)
    train(BothHalvesTask, settings, tmp_path / "one")
    two, one = (load_file(tmp_path / name / "state.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
    fresh = dict(LineTask().modules.named_parameters())
    assert all(not torch.equal(one[f"weights.{name}"], parameter) for name, parameter in fresh.items())


def test_learning_rate_warms_up_and_falls():
    settings = _settings(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(factors[9:-1], factors[10:], strict=True))
    assert factors[-1] == pytest.approx(settings.final_learning_rate_fraction, abs=1e-3)


@pytest.mark.parametrize("model", [COGVIDEOX, WAN], ids=lambda model: model.name)
def test_muon_takes_hidden_matrices_only(model):
    transformer = build_pipeline(model, seed=0).transformer
    adamw, muon = build_optimizers(nn.ModuleDict({"transformer": transformer}), _settings())
    muon_ids = {id(p) for group in muon.param_groups for p in group["params"]}
    blocks = transformer.blocks if model is WAN else transformer.transformer_blocks
    assert id(blocks[0].attn1.to_q.weight) in muon_ids
    assert id(transformer.proj_out.weight) not in muon_ids
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert muon_ids | rest == {id(p) for p in transformer.parameters()}
    assert not muon_ids & rest


@torch.no_grad()
def test_normalising_latents_keeps_reconstructions_inside_the_border():
    torch.manual_seed(0)
    plain, changed = COGVIDEOX.build_vae().eval(), COGVIDEOX.build_vae().eval()
    changed.load_state_dict(plain.state_dict())
    mean, spread = torch.randn(16), torch.rand(16) + 0.5
    normalise_latents(changed, mean=mean, spread=spread)
    videos, _ = sample_batch(combinations(held_out=True)[:2], generator=torch.Generator().manual_seed(0))
    x = videos.permute(0, 2, 1, 3, 4) * 2 - 1
    before, after = plain.encode(x).latent_dist, changed.encode(x).latent_dist
    view = (1, -1, 1, 1, 1)
    assert torch.allclose(after.mean, (before.mean - mean.view(view)) / spread.view(view), atol=1e-4)
    assert torch.allclose(after.std, before.std / spread.view(view), rtol=1e-3)
    scaled_only = COGVIDEOX.build_vae().eval()
    scaled_only.load_state_dict(plain.state_dict())
    normalise_latents(scaled_only, mean=torch.zeros(16), spread=spread)
    z = before.mean
    assert torch.allclose(scaled_only.decode(z / spread.view(view)).sample, plain.decode(z).sample, atol=1e-4)


def test_vae_and_transformer_tasks_give_gradients(tmp_path):
    generator = torch.Generator().manual_seed(0)
    task = VAETask(seed=0)
    loss, figures = task.loss(2, generator)
    loss.backward()
    assert set(figures) == {"psnr_db", "kl"}
    assert all(p.grad is not None for p in task.vae.parameters())
    pool = tmp_path / "pool.safetensors"
    encode_pool(COGVIDEOX, task.vae.eval(), pool, count=6, seed=0, batch_size=4)
    for model in (COGVIDEOX, WAN):
        trained = TransformerTask(model, pool=pool, seed=0)
        assert trained.clean_latents.shape == (6, 16, 3, 8, 8)
        loss, _ = trained.loss(4, generator)
        loss.backward()
        assert loss.item() == pytest.approx(1.0, abs=1.5)  # an untrained model predicts nothing of it
        assert trained.text_encoder.shared.weight.grad is not None


def test_a_taught_autoencoder_learns_from_its_teachers_latents_alone():
    task = TaughtVAETask(WAN, teacher=COGVIDEOX.build_vae(), teacher_architecture=COGVIDEOX, seed=0)
    loss, figures = task.loss(2, torch.Generator().manual_seed(0))
    loss.backward()
    assert set(figures) == {"psnr_db", "latent_error"}
    without = {name for name, p in task.vae.named_parameters() if p.grad is None}
    assert not without
    assert all(p.grad is None for p in task.teacher.parameters())


def test_wans_decoder_is_not_clamped_while_it_learns():
    vae = WAN.build_vae().eval()
    latents = 100 * torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        free, clamped = WAN.decoded(vae, latents), vae.decode(latents).sample
    assert free.abs().max() > 1
    assert torch.equal(free.clamp(-1, 1), clamped)


@pytest.mark.parametrize("model", [COGVIDEOX, WAN], ids=lambda model: model.name)
@torch.no_grad()
def test_training_sees_text_and_velocity_as_the_pipeline_does(model):
    pipe = build_pipeline(model, seed=0)
    prompt = "a red circle moving left on a white background"
    for length in (16, PIPELINE_TEXT_TOKENS) if model is WAN else (16,):
        own = model.encode_text(pipe.text_encoder, build_tokenizer(), [prompt], length=length)
        theirs = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        assert torch.equal(own, theirs)
    clean, noise = torch.randn(2, 1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noised, target, timestep = model.noised(clean, noise, torch.tensor([0.5]))
    if model is WAN:
        assert float(timestep) == 500
        assert torch.allclose(noised - 0.5 * target, clean, atol=1e-6)
        assert torch.allclose(noised + 0.5 * target, noise, atol=1e-6)
    else:
        step = model.scheduler.alphas_cumprod[int(timestep)]
        assert torch.allclose(step.sqrt() * noised - (1 - step).sqrt() * target, clean, atol=1e-5)


@pytest.fixture(scope="module")
def image_pool(tmp_path_factory):
    """Latents and conditions of six scenes."""
    pool = tmp_path_factory.mktemp("pool") / "pool.safetensors"
    encode_pool(IMAGE, embedded_pipeline("shapes-wan", dtype=torch.float32).vae, pool, count=6, seed=0)
    return pool


@torch.no_grad()
def test_the_image_model_starts_as_the_model_that_it_starts_from(image_pool):
    task, start = ImageToVideoTask(IMAGE, pool=image_pool, seed=0), embedded_pipeline("shapes-wan", dtype=torch.float32)
    noised, text = task.clean_latents[:2].float(), torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    inputs = task.transformer_input(noised, torch.tensor([0, 1]))
    assert inputs.shape == (2, 36, 3, 8, 8)
    timesteps = torch.tensor([200.0, 700.0])
    ours, theirs = (
        WAN.predict(transformer, x, text, timesteps)
        for transformer, x in ((task.transformer, inputs), (start.transformer, noised))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_the_transformer_of_the_image_model_is_trained(image_pool):
    task = ImageToVideoTask(IMAGE, pool=image_pool, seed=0)
    loss, _ = task.loss(4, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(parameter.grad is None for parameter in task.text_encoder.parameters())
    assert bool(task.transformer.patch_embedding.weight.grad[:, 16:].any())


@torch.no_grad()
def test_training_sees_the_image_as_the_pipeline_does(image_pool):
    pipe, seen = build_pipeline(IMAGE, seed=0), []
    pipe.register_modules(vae=embedded_pipeline("shapes-wan", dtype=torch.float32).vae)
    videos, captions = sample_batch(combinations(held_out=False)[:1], generator=torch.Generator().manual_seed(0))
    videos = (videos * 255).round() / 255
    pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["hidden_states"]), with_kwargs=True
    )
    image = (videos[0, 0] * 255).round().to(torch.uint8).permute(1, 2, 0)
    sample(pipe, captions, images=[image], seed=0, **IMAGE.generation | {"num_inference_steps": 1})
    task = ImageToVideoTask(IMAGE, pool=image_pool, seed=0)
    task.conditions = IMAGE.pooled(pipe.vae, videos)["conditions"]
    torch.testing.assert_close(task.transformer_input(seen[0][:, :16], torch.tensor([0])), seen[0])


@pytest.mark.parametrize("model", [COGVIDEOX, WAN, IMAGE], ids=lambda model: model.name)
def test_cards_say_what_went_into_a_model(model, tmp_path):
    shipped = embedded_folder(model.name)
    write_card(model, tmp_path, json.loads((shipped / "training.json").read_text()))
    written, there = ((folder / "README.md").read_text() for folder in (tmp_path, shipped))
    assert written.partition("\n![loss]")[0] == there.partition("\n![loss]")[0]
    assert ("No other data\nor weights went into it." in written) == (model is COGVIDEOX)
    assert ("whose transformer was trained from that of `shapes-wan`" in written) == (model is IMAGE)
    assert ("`shapes-cogvideox`, whose latents" in written) == (model is WAN)


def test_averages_of_another_model_are_refused(tmp_path):
    save_file({"vae.unknown.weight": torch.zeros(1)}, tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match="unknown"):
        load_average(COGVIDEOX.build_vae(), tmp_path / "ema.safetensors", prefix="vae.")


def test_building_twice_gives_the_same_weights_and_leaves_the_global_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (functools.partial(build_pipeline, COGVIDEOX, seed=3)() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.transformer.proj_out.weight, second.transformer.proj_out.weight)
