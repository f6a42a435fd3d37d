"""The index arithmetic of the Hopper kernels, compiled for the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lightning_fastmoe.ops import _build

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>

#include "weight_gradient.cuh"

using namespace lightning_fastmoe::hopper;

#define CHECK(condition)                                   \
  do {                                                     \
    if (condition) break;                                  \
    std::printf("line %d: %s\n", __LINE__, #condition);   \
    return 1;                                              \
  } while (0)

int main() {
  // Every tile once, none outside.
  for (int pairs = 1; pairs <= 40; ++pairs) {
    for (int columns = 1; columns <= 7; ++columns) {
      std::set<std::pair<int, int>> seen;
      for (int local = 0; local < pairs * columns; ++local) {
        const TilePosition at = tile_position(local, pairs, columns);
        CHECK(at.m >= 0 && at.m < pairs && at.n >= 0 && at.n < columns);
        seen.insert({at.m, at.n});
      }
      CHECK(static_cast<int>(seen.size()) == pairs * columns);
    }
  }
  // Every tile once over both blocks of all clusters; none but the last may have no columns.
  for (int tiles = 1; tiles <= 41; ++tiles) {
    for (int columns = 1; columns <= 7; ++columns) {
      std::set<std::pair<int, int>> seen;
      int idle = 0;
      for (int local = 0; local < row_units(tiles, columns); ++local) {
        for (int rank = 0; rank < kCluster; ++rank) {
          const RowUnit unit = row_unit(local, tiles, columns, rank);
          const RowUnit other = row_unit(local, tiles, columns, 1 - rank);
          CHECK(unit.m >= 0 && unit.m < tiles && unit.n >= 0);
          CHECK(unit.shares == other.shares && unit.first_n == other.first_n);
          CHECK(unit.first_n <= unit.n);
          if (unit.shares) CHECK(unit.n == other.n && unit.m / kCluster == other.m / kCluster);
          if (unit.n >= columns) {
            ++idle;
          } else {
            CHECK(seen.insert({unit.m, unit.n}).second);
          }
        }
      }
      CHECK(static_cast<int>(seen.size()) == tiles * columns && idle <= 1);
    }
  }
  // A swizzled tile is a permutation of its 16-byte units.
  std::set<unsigned> places;
  for (unsigned row = 0; row < 64; ++row) {
    for (unsigned unit = 0; unit < 8; ++unit) places.insert(swizzled(row, unit));
  }
  CHECK(places.size() == 512 && *places.begin() == 0 && *places.rbegin() == 511 * 16);
  // The workspace holds the parts of any routing, and an even routing of many experts is not split.
  std::srand(1);
  for (int trial = 0; trial < 20000; ++trial) {
    const int experts = 1 + std::rand() % 64, m = 8 * (1 + std::rand() % 512);
    const int n = 8 * (1 + std::rand() % 512);
    int64_t rows = 0;
    int counts[64];
    for (int e = 0; e < experts; ++e) {
      counts[e] = std::rand() % 4 == 0 ? std::rand() % 20000 : std::rand() % 300;
      rows += counts[e];
    }
    const int64_t chunk = gradient_chunk(rows, m, n, 132);
    CHECK(chunk >= kTileK && chunk % kTileK == 0);
    int64_t parts = 0;
    for (int e = 0; e < experts; ++e) {
      const int chunks = chunks_of(counts[e], static_cast<int>(chunk));
      CHECK(chunks >= 1 && int64_t{chunks} * chunk >= counts[e]);
      if (chunks > 1) parts += chunks;
    }
    CHECK(parts <= gradient_parts(rows, chunk));
    // The last round has room for the parts of the tail.
    const Tail tail = gradient_tail(rows, m, n, experts, 132);
    const int units = experts * units_of_part(m, n), clusters = 132 / kCluster;
    CHECK(tail.units == 0 || tail.units == units % clusters);
    CHECK(tail.units == 0 ? tail.parts == 1 : tail.parts >= 2 && tail.parts <= 4);
    CHECK(tail.units * tail.parts <= clusters);
  }
  // The bound on parts is exact: as many experts as can be split, each just long enough.
  for (int chunk = 64; chunk <= 640; chunk += 64) {
    for (int rows = 1; rows < 4000; rows += 7) {
      const int experts = rows / (chunk + 1);
      const int last = rows - (experts - 1) * (chunk + 1);  // what is left goes to one of them
      const int parts = experts == 0 ? 0 : 2 * (experts - 1) + chunks_of(last, chunk);
      CHECK(gradient_parts(rows, chunk) == parts);
    }
  }
  // (32768, 768, 3072, 8, 1): 288 units for 66 clusters, so 24 are left, in two parts each.
  const Tail tail = gradient_tail(32768, 768, 3072, 8, 132);
  CHECK(tail.units == 24 && tail.parts == 2);
  CHECK(gradient_tail(8192, 1024, 4096, 64, 132).units == 0);  // 62 rounds: too little to gain
  CHECK(gradient_chunk(128 * 1536, 1536, 256, 132) > 1536 * 2);
  CHECK(gradient_parts(1000, gradient_chunk(1000, 4096, 14336, 132)) == 0);
  return 0;
}
"""


def test_schedule(tmp_path: Path) -> None:
    try:
        nvcc = _build.find_nvcc()
    except _build.Unavailable as error:
        pytest.skip(str(error))
    source, program = tmp_path / "schedule.cu", tmp_path / "schedule"
    source.write_text(PROGRAM)
    folder = _build.SOURCES / "hopper"
    command = [str(nvcc), "-std=c++20", f"-I{folder}", "-o", str(program), str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
