"""dev/cuda_resources.py: its parsers and its arithmetic, against texts and sums made by hand."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "las_mm::cuda::"
TILE = "SparseGemm<Tile<__half, 128, 2, 64, 64, true, false, false> >"


@pytest.fixture(scope="module")
def tools():
    """``tools(name)``: a module of dev/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "dev"))
        yield __import__


@pytest.fixture(scope="module")
def resources(tools):
    return tools("cuda_resources")


def entry(kernel: str) -> str:
    """The demangled name of a kernel's entry."""
    kernel = kernel.replace("SparseGemm", f"{NAMESPACE}SparseGemm")
    kernel = kernel.replace("Tile", f"{NAMESPACE}Tile").replace("ReluRows", f"{NAMESPACE}ReluRows")
    return f"void {NAMESPACE}entry<{kernel} >({kernel}::Params)"


def ptxas(kernel: str, architecture: int, resources: str, used: str) -> str:
    name = entry(kernel)
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_{architecture}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {resources}\n"
        f"ptxas info    : Used {used}\n"
        "ptxas info    : Compile time = 352.011 ms\n"
    )


CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


class TestParsePtxas:
    def test_reads_every_kernel_of_every_architecture(self, resources):
        text = (
            "ptxas info    : 28 bytes gmem, 224 bytes cmem[4]\n"
            + ptxas(TILE, 80, CLEAN, "128 registers, used 1 barriers, 552 bytes cmem[0]")
            + ptxas(TILE, 90, CLEAN, "126 registers, used 1 barriers, 48 bytes smem")
            + ptxas("ReluRows<float>", 80, CLEAN, "24 registers, 48+16 bytes smem, 8 bytes cmem[2]")
        )
        assert resources.parse_ptxas(text) == {
            (TILE, 80): resources.Compiled(registers=128, stack=0, spills=0, shared=0),
            (TILE, 90): resources.Compiled(registers=126, stack=0, spills=0, shared=48),
            ("ReluRows<float>", 80): resources.Compiled(24, 0, 0, 48),
        }

    def test_adds_spills_and_called_functions(self, resources):
        text = ptxas(
            TILE,
            86,
            "16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads",
            "255 registers",
        )
        text += (
            "ptxas info    : Function properties for helper\n"
            "    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n"
        )
        assert resources.parse_ptxas(text) == {(TILE, 86): resources.Compiled(255, 24, 36, 0)}

    def test_the_worst_counts_if_several_sources_hold_a_kernel(self, resources):
        spilled = "8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"
        worse = ptxas(TILE, 80, spilled, "96 registers")
        better = ptxas(TILE, 80, CLEAN, "128 registers")
        for text in (worse + better, better + worse):
            assert resources.parse_ptxas(text) == {(TILE, 80): resources.Compiled(96, 8, 16, 0)}

    def test_other_entries_are_not_ours(self, resources):
        text = "ptxas info    : Compiling entry function 'scan(int)' for 'sm_80'\n"
        text += f"    {CLEAN}\nptxas info    : Used 9 registers\n"
        assert resources.parse_ptxas(text) == {}


def test_parse_sass_counts_instructions(tools):
    text = """
        code for sm_80
        Function : first
    .headerflags    @"EF_CUDA_SM80"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ; /* 0x00000a00ff017624 */
                                                                          /* 0x000fe400078e00ff */
        /*0010*/               @P0 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;       /* 0x0000 */
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;       /* 0x0000 */
        /*0030*/             @!UP0 HMMA.16816.F32 R4, R4, R8, R4 ;           /* 0x0000 */
        Function : second
        /*0000*/                   EXIT ;                                    /* 0x0000 */
    """
    assert tools("_cuda_kernels").parse_sass(text.splitlines()) == {
        "first": Counter(IMAD=1, LDGSTS=2, HMMA=1),
        "second": Counter(EXIT=1),
    }


# 44544 bytes: a tile of 128x64, three stages. 154 registers: 5120 per warp, 3 warps per quarter of
# the registers, 12 in all; 111 registers: 3584 per warp, 4 and 16.
@pytest.mark.parametrize(
    "architecture, threads, registers, shared, blocks",
    [
        (80, 128, 154, 44544, 3),  # registers: 12 / 4; shared memory: 164 / 44.5
        (90, 128, 154, 44544, 3),
        (90, 128, 111, 44544, 4),
        (86, 128, 111, 44544, 2),  # shared memory: 100 / 44.5 KiB
        (75, 128, 111, 44544, 1),  # 64 / 43.5 KiB
        (75, 256, 128, 58368, 1),  # the large tile fits once,
        (75, 256, 128, 65537, 0),  # and more than 64 KiB never
        (86, 256, 128, 50176, 2),  # 2 x (49 + 1) KiB are all there is
        (86, 256, 128, 50177, 1),
        (80, 256, 128, 0, 2),
        (80, 256, 129, 0, 1),  # 4352 per warp: 3 warps in a quarter
        (75, 256, 32, 0, 4),  # warps: 32 / 8
        (120, 256, 32, 0, 6),  # 48 / 8
        (80, 32, 16, 0, 32),  # blocks
        (75, 32, 16, 32, 16),
        (80, 1024, 255, 0, 0),  # one block needs more registers than there are
    ],
)
def test_occupancy(resources, architecture, threads, registers, shared, blocks):
    assert resources.blocks_per_multiprocessor(architecture, threads, registers, shared) == blocks


def test_occupancy_agrees_with_the_toolkits_calculator(resources, tmp_path):
    torch = pytest.importorskip("torch")
    toolkit = resources.load_setup().find_cuda_toolkit(torch)
    compiler = shutil.which("g++")
    if not toolkit or not (Path(toolkit) / "include/cuda_occupancy.h").is_file() or not compiler:
        pytest.skip("needs a CUDA toolkit and g++")
    draw = random.Random(0)
    cases = []
    for architecture, limits in resources.LIMITS.items():
        for _ in range(200):
            threads, registers = draw.choice((32, 64, 128, 192, 256, 512)), draw.randint(16, 255)
            cases.append((architecture, threads, registers, draw.randint(0, limits.shared * 1024)))
    lines = []
    for architecture, threads, registers, shared in cases:
        limits = resources.LIMITS[architecture]
        block_shared, reserved = limits.block_shared * 1024, 1024 if architecture >= 80 else 0
        numbers = (architecture // 10, architecture % 10, limits.warps * 32, limits.shared * 1024)
        lines.append(
            " ".join(map(str, (*numbers, block_shared, reserved, threads, registers, shared)))
        )
    (tmp_path / "occupancy.cpp").write_text(
        """
        #include <climits>
        #include <cstdio>
        #include "cuda_occupancy.h"
        int main() {
          cudaOccDeviceProp p;
          p.maxThreadsPerBlock = 1024;
          p.regsPerBlock = p.regsPerMultiprocessor = 65536;
          p.warpSize = 32;
          p.sharedMemPerBlock = 48 << 10;
          p.numSms = 1;
          cudaOccFuncAttributes f;
          f.maxThreadsPerBlock = INT_MAX;
          f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
          cudaOccDeviceState s;
          s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
          int threads;
          size_t shared;
          while (std::scanf("%d %d %d %zu %zu %zu %d %d %zu", &p.computeMajor, &p.computeMinor,
                            &p.maxThreadsPerMultiprocessor, &p.sharedMemPerMultiprocessor,
                            &p.sharedMemPerBlockOptin, &p.reservedSharedMemPerBlock, &threads,
                            &f.numRegs, &shared) == 9) {
            f.maxDynamicSharedSizeBytes = shared;
            cudaOccResult result;
            const int error =
                cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &s, threads, shared);
            std::printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
          }
        }
        """
    )
    program = tmp_path / "occupancy"
    include = f"-I{toolkit}/include"
    subprocess.run([compiler, include, "-o", program, tmp_path / "occupancy.cpp"], check=True)
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    expected = list(map(int, done.stdout.split()))
    assert [resources.blocks_per_multiprocessor(*case) for case in cases] == expected


class TestConstants:
    @pytest.fixture(scope="class")
    def constants(self, resources, tmp_path_factory):
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        kernels = [
            TILE,
            "SparseGemm<Tile<float, 64, 1, 32, 32, true, true, false> >",
            "SparseGemm<Tile<__half, 64, 1, 0, 0, false, false, false> >",
            "SparseGemm<Tile<float, 64, 1, 0, 0, false, false, false> >",
            "SparseGemm<Selected<Tile<__half, 64, 1, 32, 32, true, false, false> > >",
            "ReluRows<__nv_bfloat16>",
            "DecidePatches<__half, 256>",
        ]
        folder = tmp_path_factory.mktemp("constants")
        found = resources.read_constants(kernels, [72, 75, 80], folder)
        assert set(found) == set(kernels)
        return found

    def test_come_from_the_headers(self, constants):
        large = constants[TILE]
        assert (large.rows, large.columns, large.threads) == (128, 128, 128)
        assert large.shared > 3 * (128 + 128) * 16 * 4 and large.min_blocks >= 1
        decide = constants["DecidePatches<__half, 256>"]
        assert decide.threads == 256 and decide.shared == 8 * 4 and not decide.rows

    def test_titles_are_short(self, constants):
        assert sorted(c.title for c in constants.values()) == [
            "DecidePatches half 256",
            "ReluRows bf16",
            "SparseGemm float 64x64 plain",
            "SparseGemm float 64x64 tensor cores scores",
            "SparseGemm half 128x128 tensor cores",
            "SparseGemm half 64x64 plain",
            "SparseGemm half 64x64 tensor cores selected",
        ]

    def test_know_where_a_kernel_is_launched(self, constants):
        meant = {c.title: c.meant for c in constants.values()}
        assert meant["ReluRows bf16"] == (72, 75, 80)
        assert meant["SparseGemm half 128x128 tensor cores"] == (75, 80)
        assert meant["SparseGemm half 64x64 plain"] == (72,)
        assert meant["SparseGemm float 64x64 tensor cores scores"] == (80,)
        assert meant["SparseGemm float 64x64 plain"] == (72, 75, 80)  # tf32 may be off

    def test_kernels_that_convert_do_not_copy_asynchronously(self, constants):
        copies = {c.title: bool(c.copies) for c in constants.values() if c.rows}
        assert copies.pop("SparseGemm half 64x64 plain") is False
        assert all(copies.values())

    def test_a_kernel_that_is_not_there_is_an_error(self, resources, tmp_path):
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        with pytest.raises(resources.ResourceError, match="do not compile"):
            resources.read_constants(["NoSuchKernel"], [80], tmp_path)


class TestChecks:
    @pytest.fixture
    def make(self, resources):
        """An entry that passes all checks, or not."""

        def call(architecture=80, registers=128, stack=0, spills=0, code=None, **more):
            fields = dict(threads=256, min_blocks=2, shared=58368, rows=128, columns=128)
            fields.update(tensor_cores=1, copies=1, **more)
            constants = resources.Constants(TILE, (75, 80, 86), **fields)
            compiled = resources.Compiled(registers, stack, spills, 0)
            code = dict(HMMA=64, LDGSTS=8) if code is None else code
            return resources.Entry(constants, architecture, compiled, code)

        return call

    def test_pass(self, make):
        assert make().failures() == []

    def test_spills_and_stack(self, make):
        assert "8 bytes of spills" in make(spills=8).failures()[0]
        assert "16 bytes of stack" in make(stack=16).failures()[0]

    def test_registers_below_the_wanted_occupancy(self, make):
        (failure,) = make(registers=129).failures()
        assert failure.startswith("SparseGemm half 128x128 tensor cores, sm_80: 1 blocks")
        assert "instead of 2" in failure

    def test_shared_memory_may_allow_fewer_blocks_than_wanted(self, make):
        assert make(75, code=dict(HMMA=64)).failures() == []  # 64 KiB: one block

    def test_shared_memory_that_a_gpu_does_not_have(self, resources, make):
        constants = make().constants
        big = resources.Constants(TILE, (86,), 256, 1, 100 * 1024, 128, 128, 1, 0, 1)
        assert constants.shared < big.shared
        entry = resources.Entry(big, 86, make().compiled, make().code)
        assert any("the GPU allows 101376" in failure for failure in entry.failures())

    def test_instructions(self, make):
        assert "HMMA" in make(code=dict(LDGSTS=8)).failures()[0]
        assert "LDGSTS" in make(code=dict(HMMA=8)).failures()[0]
        assert "LDGSTS" not in str(make(75, code=dict(HMMA=8)).failures())

    def test_a_kernel_seen_by_only_one_side_is_reported(self, resources, make):
        constants = {TILE: make().constants}
        compiled = {(TILE, 80): make().compiled}
        entries, missing = resources.collect(compiled, constants, {80: {TILE: Counter(HMMA=1)}})
        assert [e.architecture for e in entries] == [80] and missing == []
        _, missing = resources.collect(compiled, constants, {80: {}})
        assert "not in the machine code" in missing[0]
        _, missing = resources.collect({}, constants, {80: {TILE: Counter()}})
        assert "not in what ptxas said" in missing[0] and "no kernel at all" in missing[1]

    def test_a_kernel_is_not_listed_where_it_is_not_launched(self, resources, make):
        compiled = {(TILE, 72): make().compiled}
        entries, missing = resources.collect(
            compiled, {TILE: make().constants}, {72: {TILE: Counter()}}
        )
        assert entries == [] and missing == []

    def test_table(self, resources, make):
        table = resources.rows([make(), make(75)], [75, 80, 86])
        assert table == [
            ["kernel", "threads", "shared bytes", "blocks", "sm_75", "sm_80", "sm_86"],
            [
                "SparseGemm half 128x128 tensor cores",
                "256",
                "58368",
                "2",
                "128 / 1 / 8",
                "128 / 2 / 16",
                "",
            ],
        ]
        lines = resources.markdown(table, "Note.").splitlines()
        assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
        assert lines[2].startswith("| SparseGemm half 128x128 tensor cores | 256 | 58368 |")
        assert lines[-1] == "Note."


def test_write_replaces_what_stands_between_the_markers(resources, tmp_path):
    path = tmp_path / "cuda.md"
    resources.write_between_markers(path, "| new |")
    assert path.read_text().startswith("# CUDA\n")
    path.write_text("before\n<!-- resources -->\nold\n<!-- /resources -->\nafter\n")
    resources.write_between_markers(path, "| a |\n\nNote.")
    expected = "before\n<!-- resources -->\n| a |\n\nNote.\n<!-- /resources -->\nafter\n"
    assert path.read_text() == expected
    path.write_text("no markers\n")
    with pytest.raises(resources.ResourceError, match="must contain"):
        resources.write_between_markers(path, "| b |")
    assert path.read_text() == "no markers\n"


class TestWithoutCompiler:
    @pytest.fixture(autouse=True)
    def _no_toolkit(self, resources, monkeypatch):
        monkeypatch.setattr(
            resources, "load_setup", lambda: type("", (), {"find_cuda_toolkit": lambda torch: None})
        )

    def test_is_an_error(self, resources):
        with pytest.raises(SystemExit, match="error: no nvcc"):
            resources.main([])

    def test_or_skipped_with_a_message(self, resources, capsys):
        assert resources.main(["--optional"]) == 0
        assert capsys.readouterr().out.startswith("skipped: CUDA kernels not built (no nvcc")


def test_unknown_architectures_are_refused(tmp_path):
    tool = ROOT / "dev" / "cuda_resources.py"
    command = [sys.executable, str(tool), "--architectures", "76"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 76" in done.stderr
