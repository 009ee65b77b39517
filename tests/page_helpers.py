"""What the tests of the page share: its scripts in Node, and its models."""

import base64
import json
import shutil
import subprocess

import pytest

from tiny_diffusion.page.scripts import METHOD, NETWORK, kernel, script

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node, which runs the page's scripts, is not installed")


def in_node(body: str, **data):
    """What `body` returns, which is JavaScript with the page's functions, the data by name, and KERNEL."""
    values = {**data, "kernelText": base64.b64encode(kernel()).decode()}
    source = f"""{script((*METHOD, *NETWORK))}
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
const KERNEL = bytesOf(given.kernelText);
const plain = (value) => (ArrayBuffer.isView(value) ? Array.from(value) : value);
process.stdout.write(JSON.stringify((({{ {", ".join(data)} }}) => {{ {body} }})(given), (_, value) => plain(value)));
"""
    done = subprocess.run(
        [NODE, "-e", source] if len(source) < 100_000 else [NODE, "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
