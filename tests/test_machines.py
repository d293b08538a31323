"""Two machines: network namespaces with addresses of their own, each running finetune_multi_gpus_1.sh, as users do."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT
from make_example import make_clips
from safetensors.torch import load_file
from test_distributed import rows_of

from cogvideox.lora_files import LORA_FILE
from run.run_directory import list_checkpoints

ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOSTS = (f"cogvideox-{os.getpid()}-a", f"cogvideox-{os.getpid()}-b")
OPTIONS = {
    "height": 64, "width": 96, "max_num_frames": 9, "rank": 4, "mixed_precision": "no", "learning_rate": 1e-3,
    "adam_beta2": 0.95, "seed": 3407,
}  # fmt: skip
pytestmark = pytest.mark.skipif(not shutil.which("accelerate"), reason="the launch scripts find accelerate on PATH")


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces with a cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)  # noqa: E731
    try:
        for host in HOSTS:
            ip("netns", "add", host)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", "cable-a", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable-b", "netns", HOSTS[1])
        for host, end, address in zip(HOSTS, ("cable-a", "cable-b"), ADDRESSES):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", end, "up")
        yield HOSTS
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


@contextlib.contextmanager
def machines(checkpoint, datasets, outputs, **options):
    """One process on each of two machines; the two processes, which are ended at the latest when the block ends."""
    line = [word for name, value in (OPTIONS | options).items() for word in (f"--{name}", str(value))]
    started = []
    for rank, host in enumerate(HOSTS):
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable-{host[-1]}",
            "NUM_MACHINES": "2", "MACHINE_RANK": str(rank), "NUM_GPUS": "1", "MAIN_PROCESS_IP": ADDRESSES[0],
            "MODEL_PATH": str(checkpoint), "DATASET_PATH": str(datasets[rank]), "OUTPUT_PATH": str(outputs[rank]),
        }  # fmt: skip
        command = ["ip", "netns", "exec", host, "bash", ROOT / "finetune_multi_gpus_1.sh", *line]
        started.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    try:
        yield started
    finally:
        for host in HOSTS:
            kill(host)
        for process in started:
            process.wait()


def kill(host):
    """Ends what runs on a machine, as pulling its plug would."""
    for process in subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def finish(started, timeout=240):
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    return [process.returncode for process in started], outputs


def test_a_machine_that_dies_ends_the_other_with_a_message_and_the_run_resumes(
    hosts, tiny_checkpoint, clips, tmp_path, train
):
    """On shared folders: then both go on from the last checkpoint, and do what one process does."""
    run = tmp_path / "run"
    with machines(
        tiny_checkpoint, [clips] * 2, [run] * 2, max_train_steps=5000, checkpointing_steps=5, validation_prompt="a cat",
        validation_epochs=100000,
    ) as started:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (run / "checkpoint-5").exists():
            assert time.monotonic() < deadline and started[0].poll() is None
            time.sleep(0.1)
        kill(HOSTS[1])
        (code, _), (output, _) = finish(started, timeout=60)  # well below --ddp_timeout: the connection is closed
    assert code == 1 and "another process of the run is gone" in output and "--resume_from_checkpoint auto" in output
    step = int(list_checkpoints(run)[-1].name.removeprefix("checkpoint-"))

    options = {"max_train_steps": step + 3, "checkpointing_steps": 2}
    validation = {"validation_prompt": "a cat:::a dog:::a cow", "resume_from_checkpoint": "latest"}
    with machines(tiny_checkpoint, [clips] * 2, [run] * 2, **options, **validation) as started:
        codes, outputs = finish(started)
    assert codes == [0, 0], outputs
    assert len(list((run / "validation" / f"step-{step + 3:06d}").glob("*.mp4"))) == 3
    train(tiny_checkpoint, tmp_path / "one", gradient_accumulation_steps=2, **OPTIONS | options)
    for ours, theirs in zip(rows_of(run), rows_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_machines_with_disks_of_their_own_each_encode_and_the_first_one_writes(hosts, checkpoint_of, tmp_path, train):
    """The same clips lie on both; a run resumes from the first machine's disk alone."""
    datasets = [make_clips(tmp_path / name / "clips", count=3) for name in "ab"]
    outputs = [tmp_path / name / "run" for name in "ab"]
    checkpoint = checkpoint_of("1.5-5B-I2V")
    with machines(checkpoint, datasets, outputs, max_train_steps=2, checkpointing_steps=2) as started:
        codes, texts = finish(started)
    assert codes == [0, 0], texts
    names = [sorted(path.name for path in (folder / ".cogvideox_cache").glob("*/*.safetensors")) for folder in datasets]
    assert names[0] == names[1] and len(names[0]) == 3 + 3 + 1  # clips, captions, ""
    assert not [path for folder in datasets for path in (folder / ".cogvideox_cache").glob(".machine-*")]
    with machines(
        checkpoint, datasets, outputs, max_train_steps=4, resume_from_checkpoint="latest", validation_prompt="a:::b"
    ) as started:
        codes, texts = finish(started)
    assert codes == [0, 0], texts
    assert not outputs[1].exists()
    assert len(list(outputs[0].glob("validation/*/*.mp4"))) == 2
    train(
        checkpoint, tmp_path / "one", instance_data_root=datasets[0], gradient_accumulation_steps=2,
        **OPTIONS | {"max_train_steps": 4},
    )  # fmt: skip
    assert [row["loss"] for row in rows_of(outputs[0])] == pytest.approx(
        [row["loss"] for row in rows_of(tmp_path / "one")], rel=1e-4
    )
    one, two = load_file(tmp_path / "one" / LORA_FILE), load_file(outputs[0] / LORA_FILE)
    assert one.keys() == two.keys()


def test_machines_with_different_clips_are_told(hosts, tiny_checkpoint, tmp_path):
    datasets = [make_clips(tmp_path / name / "clips", count=2) for name in "ab"]
    prompts = (datasets[1] / "prompts.txt").read_text()
    (datasets[1] / "prompts.txt").write_text(prompts.replace("circle", "cycle"))
    with machines(tiny_checkpoint, datasets, [tmp_path / "run"] * 2, max_train_steps=2) as started:
        codes, outputs = finish(started)
    assert 0 not in codes
    assert "the machines of this run see different clips or captions there; copy one to all" in outputs[0]
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning_wants_a_folder_that_all_machines_see(hosts, tiny_checkpoint, clips, tmp_path, monkeypatch):
    outputs = [tmp_path / name for name in "ab"]
    monkeypatch.delitem(OPTIONS, "rank")
    with machines(tiny_checkpoint, [clips] * 2, outputs, max_train_steps=2, training_type="sft") as started:
        codes, texts = finish(started)
    assert (
        0 not in codes and f"--output_dir {outputs[0]}: the machines of this run do not see the same folder" in texts[0]
    )
    assert not outputs[0].exists() and not outputs[1].exists()


def test_the_slurm_script_starts_a_run_on_every_node_and_resumes_it(tiny_checkpoint, clips, tmp_path):
    """With stand-ins for srun and scontrol, whose two nodes are this machine."""
    (tmp_path / "srun").write_text(
        '#!/usr/bin/env bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
        'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; code=$?; wait $! && exit $code\n'
    )
    (tmp_path / "scontrol").write_text('#!/usr/bin/env bash\n[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "MODEL_PATH": str(tiny_checkpoint),
        "DATASET_PATH": str(clips), "OUTPUT_PATH": str(tmp_path / "run"),
    }  # fmt: skip
    line = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    for steps in (2, 4):
        command = ["bash", ROOT / "examples" / "slurm.sh", *line, "--max_train_steps", str(steps)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-3000:]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]
