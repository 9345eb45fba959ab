"""One video by several GPUs: diffusers splits the tokens, vidaccel runs each GPU's heads by the plan.

torchrun --nproc-per-node 2 examples/two_gpus.py PATH_OR_HUB_ID     # a Wan pipeline, into two_gpus.mp4
torchrun --nproc-per-node 2 examples/two_gpus.py                    # a tiny random transformer; needs no GPU
"""

from __future__ import annotations

import sys

import torch
import torch.distributed
from diffusers import ContextParallelConfig, WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video

import vidaccel

PROMPT = "a red ball rolls over a green table"


def generate(model: str, device: torch.device, split: ContextParallelConfig) -> None:
    """A video; every process must use the same seed, and all get the same frames."""
    pipe = WanPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    session = vidaccel.patch(pipe, "sta")
    pipe.transformer.enable_parallelism(config=split)
    if pipe.transformer_2 is not None:
        pipe.transformer_2.enable_parallelism(config=split)
    frames = pipe(PROMPT, generator=torch.Generator(device).manual_seed(0)).frames[0]
    if torch.distributed.get_rank() == 0:
        export_to_video(frames, "two_gpus.mp4", fps=16)
        print(session.report())


@torch.no_grad()
def try_out(device: torch.device, split: ContextParallelConfig) -> None:
    """The same forward pass by this process alone, and then by all of them."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=2
    ).to(device)
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 24, 32, device=device),
        "encoder_hidden_states": torch.randn(1, 16, 32, device=device),
        "timestep": torch.tensor([500], device=device),
        "return_dict": False,  # as pipelines call it; diffusers' hooks know no other form
    }
    session = vidaccel.patch(model, "sta")
    alone = model(**inputs)[0]
    session.reset_stats()
    model.enable_parallelism(config=split)
    together = model(**inputs)[0]
    if torch.distributed.get_rank() == 0:
        print(session.report())
        print(f"largest difference to one process: {float((alone - together).abs().max()):.2g}")


def main() -> None:
    """Starts the processes' group, and undoes it."""
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:  # diffusers numbers the processes' devices by this count, in which a CPU is none
        torch.accelerator.device_count = lambda: 1
    split = ContextParallelConfig(ulysses_degree=count)
    if len(sys.argv) > 1:
        generate(sys.argv[1], device, split)
    else:
        try_out(device, split)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
