"""What mlx-lm writes of the models and requests of examples/throughput.rs, for its table in MEASUREMENTS.md.

    pip install mlx-lm==0.32.2 "mlx[cuda13]==0.32.2"
    MLX_CUDA_GRAPH_CACHE_SIZE=20000 python benches/beside_mlx_lm.py --shape smollm2-135m --batch 32 64

Random weights, greedy. Of one stream: a prompt of 512 tokens and 64 more; of many requests: 32 to 511 tokens that get 32 to
159, and all new tokens over the time that it takes. The first round of each is cold.
"""

import argparse
import time

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import llama

# Layers, dims, heads, key heads, head size, hidden dims, vocabulary.
SHAPES = {
    "smollm2-135m": (30, 576, 9, 3, 64, 1536, 49152),
    "llama-8b": (32, 4096, 32, 8, 128, 14336, 128256),
}
REQUESTS = 64
ROUNDS_OF_ONE = 5
ROUNDS_OF_MANY = 3


def model_of(shape, bits):
    layers, dims, heads, key_heads, head_dim, hidden, vocabulary = SHAPES[shape]
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=dims,
            num_hidden_layers=layers,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            vocab_size=vocabulary,
            rms_norm_eps=1e-5,
            rope_theta=10000,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


def prompt_of(request, length):
    return [(place * 31 + request * 977) % 49152 for place in range(length)]


def one_stream(model):
    start = time.perf_counter()
    tokens = generate_step(mx.array(prompt_of(1, 512)), model, max_tokens=64)
    next(tokens)
    first = time.perf_counter()
    written = 1 + sum(1 for _ in tokens)
    end = time.perf_counter()
    print(f"one stream: {512 / (first - start):.0f} prompt tok/s, {written / (end - first):.0f} new tok/s", flush=True)


def at_once(model, batch):
    lengths = [(32 + n * 7919 % 480, 32 + n * 104729 % 128) for n in range(REQUESTS)]
    prompts = [prompt_of(n, length) for n, (length, _) in enumerate(lengths)]
    start = time.perf_counter()
    generator = BatchGenerator(model, completion_batch_size=batch)
    generator.insert(prompts, [tokens for _, tokens in lengths])
    written = 0
    while responses := generator.next_generated():
        written += len(responses)
    generator.close()
    print(f"{batch} at once: {written / (time.perf_counter() - start):.0f} new tok/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="packs the weights, in groups of 64")
    parser.add_argument("--batch", type=int, nargs="*", default=[32], help="how many are served at once")
    args = parser.parse_args()
    model = model_of(args.shape, args.bits)
    for _ in range(ROUNDS_OF_ONE):
        one_stream(model)
    for batch in args.batch:
        for _ in range(ROUNDS_OF_MANY):
            at_once(model, batch)


main()
