// C interface of the recurrence's cluster tier: the blocks of a cluster (sm_90 and newer) keep w_hh of their direction on chip
// and send each other what every step makes; clusters share nothing but inputs. Tensors: lstm_recurrence.h.
#pragma once

#include "cuda/lstm_recurrence.h"

namespace fuseblock {

// The sizes that the kernels are compiled for, and the only lists of them; smaller H is padded with zero units up to the next.
// H, blocks of a cluster, parts that warps split k into, tiles of weights that a warp keeps in registers (the others: in
// shared memory). 16 bit has two kernels more, for tensors that are aligned: their tiles in registers, for one tile of 8 rows
// and for two. More than 8 blocks are more than every GPU with clusters promises.
#define FB_LSTM_CLUSTER_CLASSES(X) \
  X(256, 4, 1, 32, 32, 32) X(384, 8, 2, 16, 20, 16) X(512, 16, 2, 32, 32, 32) X(640, 16, 2, 17, 20, 16)
#define FB_LSTM_CLUSTER_FLOAT32_CLASSES(X) X(256, 8, 2, 28) X(384, 16, 4, 14) X(512, 16, 2, 28)

}  // namespace fuseblock

// dtype: fuseblock::DType number of T. shape.multiprocessors: no more than the blocks that run at the same time, since not every
// multiprocessor has enough neighbours for a cluster. With more tiles of 8 rows than clusters side by side, a cluster takes 16
// rows (not in float32).
extern "C" {
int launch_lstm_cluster_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream);
int launch_lstm_cluster_bwd(const fuseblock::LstmBwd* op, int dtype, void* stream);
// Blocks that run at the same time on the current device: 0 where not one cluster does, or no class holds H.
int lstm_cluster_fwd_resident(int64_t hidden, int dtype);
int lstm_cluster_bwd_resident(int64_t hidden, int dtype);
}
