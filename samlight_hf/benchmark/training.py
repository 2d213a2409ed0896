"""One training step of the image encoder: forward, backward and AdamW."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from .encoders import COMPILED, EAGER, OURS, encoder_gflop
from .measure import arithmetic, attempt, peak_memory, random_tensor, time_calls
from .settings import Settings


def training_rows(settings: Settings) -> Iterator[dict]:
    """Measure a training step: float32 weights, autocast to the benchmark's dtype, mean squared error, fused AdamW.

    Activations are not checkpointed. Images and random target features are on the device already.
    """
    gflop = 3 * encoder_gflop(settings.config)  # backward: gradients of inputs and of weights
    for mode in (EAGER, COMPILED) if settings.compile else (EAGER,):
        row = {
            "part": "training", "model": OURS, "mode": mode, "dtype": f"autocast to {settings.dtype_name}",
            "batch_size": settings.training_batch_size,
        }  # fmt: skip
        yield attempt(row, partial(_time_step, mode, gflop, settings))


def _time_step(mode: str, gflop: float, settings: Settings) -> dict:
    vision, device, batch_size = settings.config.vision_config, settings.device, settings.training_batch_size
    grid_size = vision.image_size // vision.patch_size
    with peak_memory(device) as memory:
        encoder = settings.make_model(dtype=torch.float32).vision_encoder.train()
        pixel_values = random_tensor((batch_size, 3, vision.image_size, vision.image_size), device, torch.float32)
        shape = (batch_size, vision.output_channels, grid_size, grid_size)
        features = random_tensor(shape, device, torch.float32, seed=1)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(encoder, dynamic=False) if mode == COMPILED else encoder

        def step():
            with torch.autocast(device.type, settings.dtype, enabled=settings.dtype != torch.float32):
                output = forward(pixel_values).last_hidden_state
            F.mse_loss(output.float(), features).backward()
            optimizer.step()
            optimizer.zero_grad()

        timing = time_calls(step, device)
    if mode == COMPILED:
        torch.compiler.reset()
    ceiling = settings.ceiling["tflops"]
    return {
        **timing, "images_per_second": 1e3 * batch_size / timing["ms"], **memory,
        **arithmetic(gflop * batch_size, timing["ms"], ceiling),
    }  # fmt: skip
