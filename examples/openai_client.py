"""Whatever speaks OpenAI's API: here their own client, unmodified (``pip install openai``).

petals-node api --model demo --bootstrap /ip4/…/tcp/…/p2p/… --api 127.0.0.1:8080
python examples/openai_client.py --url http://127.0.0.1:8080/v1
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
parser.add_argument("--key", default="any", help="what the node's --api-key says, if it has one")
arguments = parser.parse_args()

client = OpenAI(base_url=arguments.url, api_key=arguments.key)
model = client.models.list().data[0].id

completion = client.completions.create(model=model, prompt="In the beginning", max_tokens=20)
print(f"In the beginning{completion.choices[0].text!r}")

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Who created the heaven?"}],
    max_tokens=20,
    stream=True,
)
for chunk in answer:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
