# wan-loader with the pipeline, for a user who is not root. CUDA comes with torch's wheels: no CUDA image is needed.
#
#   docker build --tag wan-loader .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume /data/Wan2.2-T2V-A14B:/weights:ro \
#       wan-loader wan-loader profile /weights/high_noise_model --dtype bf16
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume /data/Wan2.2-T2V-A14B:/weights:ro \
#       --volume "$PWD/videos:/videos" wan-loader \
#       wan-pipeline generate --ckpt_dir /weights --prompt "Two cats boxing on a stage" --save_file /videos/cats.mp4
#
# The GPU: the host has NVIDIA's driver and its container toolkit (`--gpus all`), nothing else.
# Weights: mounted read-only. Nothing is written beside them; a converted cache needs a volume of its own
#   (`--volume wan-cache:/cache`, which is where XDG_CACHE_HOME points to).
# Memory: pages of the weights that are read count for the container, and leave it again when it needs room;
#   with `--memory`, loads keep their own buffers within a quarter of it. `wan-loader doctor` says what is allowed.
# --shm-size: not needed by loads of one process. Several processes (`torchrun`) exchange through NCCL, which uses
#   /dev/shm: `--shm-size 1g`, or `--ipc host`. `wan-loader stage --to /dev/shm` needs what it copies.
# --ulimit memlock=-1: not needed as a rule, because CUDA's driver pins memory without asking for that limit. Where
#   `wan-loader doctor` says that pinning is refused, pass it.

FROM python:3.12-slim AS build
COPY pyproject.toml README.md LICENSE /source/
COPY wan_loader /source/wan_loader
COPY wan_pipeline /source/wan_pipeline
COPY profiles /source/profiles
RUN python -m venv /opt/wan-loader \
    && /opt/wan-loader/bin/pip install --no-cache-dir '/source[pipeline]'

FROM python:3.12-slim
COPY --from=build /opt/wan-loader /opt/wan-loader
RUN useradd --uid 1000 --create-home wan && install --directory --mode 1777 /cache
ENV PATH=/opt/wan-loader/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER wan
WORKDIR /home/wan
CMD ["wan-loader", "doctor"]
