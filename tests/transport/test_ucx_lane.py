"""Reading UCX's protocol table."""

from common.transport.ucx_lane import UNKNOWN_LANE, parse_lane

TABLE = """#
# UCP endpoint
#
#               peer: <no debug data>
#                 lane[0]: cm tcp
#                 lane[1]:  2:tcp/lo.0 md[1]  -> md[1]/tcp/sysdev[255] seg 4294967295 rma_bw#0 am wireup
#                 lane[2]:  7:cuda_ipc/cuda.0 md[5]  -> md[5]/cuda_ipc/sysdev[255] rma_bw#1
#
# +------------------------------+----------------------------------------------------------+
# | ucp_context_1 inter-node     | tagged message by ucp_tag_send(multi) from host memory   |
# +------------------------------+-------------------------------------------------+--------+
# |                         0..9 | eager short                                     | tcp/lo |
# |                       10..inf | eager copy                                     | odd/lo |
# +------------------------------+-------------------------------------------------+--------+
#
# +------------------------------+----------------------------------------------------------+
# | ucp_context_1 intra-node     | tagged message by ucp_tag_send* from host memory         |
# +------------------------------+-------------------------------------------------+--------+
# |                         0..9 | eager short                                     | tcp/lo |
# |                       8K..inf | (?) rendezvous fragmented copy-in copy-out     | tcp/lo |
# +------------------------------+-------------------------------------------------+--------+
#
# +------------------------------+----------------------------------------------------------+
# | ucp_context_1 intra-node     | tagged message by ucp_tag_send* from cuda/GPU0           |
# +------------------------------+-------------------------------------------------+--------------------+
# |                       8K..inf | (?) rendezvous zero-copy read from remote       | cuda_ipc/cuda |
# +------------------------------+-------------------------------------------------+--------------------+
"""


def test_the_lane_is_that_of_the_largest_messages_from_this_memory() -> None:
    assert parse_lane(TABLE, "host") == "tcp"
    assert parse_lane(TABLE, "cuda") == "cuda_ipc"


def test_several_rails_are_all_named() -> None:
    rails = TABLE.replace("| cuda_ipc/cuda |", "| 60% on rc_mlx5/mlx5_0:1 and 40% on dc_mlx5/mlx5_1:1 |")
    assert parse_lane(rails, "cuda") == "rc_mlx5+dc_mlx5"


def test_without_a_table_the_bulk_lanes_are_named() -> None:
    bulk = TABLE.partition("# +--")[0]
    assert parse_lane(bulk, "host") == "tcp+cuda_ipc"
    assert parse_lane(bulk, "cuda") == "cuda_ipc", "tcp cannot read a GPU's memory"
    assert parse_lane(bulk.replace("cuda_ipc", "tcp"), "cuda") == "tcp", "unless there is nothing else"


def test_an_unreadable_table_is_unknown() -> None:
    assert parse_lane("", "host") == UNKNOWN_LANE
