"""Each private name of DeepSpeed and Lightning that the package relies on is still there.

The version ranges in pyproject.toml are tight for this reason; when one is widened, this test says
what to look at first.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

NAMES = [
    # the engine subclass
    "deepspeed.runtime.engine:DeepSpeedEngine._configure_distributed_model",
    "deepspeed.runtime.engine:DeepSpeedEngine._validate_zero3_moe_compatibility",
    "deepspeed.runtime.engine:DeepSpeedEngine._resolve_zero3_param_placement",
    "deepspeed.runtime.engine:DeepSpeedEngine._take_model_step",
    "deepspeed.runtime.engine:DeepSpeedEngine._configure_python_gc",
    "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary",
    "deepspeed.runtime.engine:DeepSpeedEngine.is_gradient_accumulation_boundary",
    "deepspeed.runtime.engine:DeepSpeedEngine.zero_optimization_partition_weights",
    # groups that the mesh is registered as
    "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP",
    "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP_RANKS",
    "deepspeed.utils.groups:_EXPERT_DATA_PARALLEL_GROUP",
    "deepspeed.utils.groups:_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    "deepspeed.ops:__compatible_ops__",
    # skipping a step
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.check_overflow",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3."
    "_overflow_check_and_loss_scale_update",
    # checkpoints
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._link_all_hp_params",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._wait_for_offload_copies",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_param_gradient_attribute",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._use_compact_grad_partition_buffer",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
    "_build_compact_grad_partition_buffer",
    "deepspeed.utils.groups:_get_expert_data_parallel_group",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3."
    "_reassign_or_swap_out_partitioned_parameters",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue",
    # Lightning
    "pytorch_lightning.core.saving:pl_load",
    "lightning_fabric.plugins.io.torch_io:pl_load",
    "pytorch_lightning.core.optimizer:_init_optimizers_and_lr_schedulers",
    "pytorch_lightning.core.module:LightningModule.device_mesh",
    "pytorch_lightning.callbacks.throughput_monitor:ThroughputMonitor._update",
    "pytorch_lightning.callbacks.throughput_monitor:_plugin_to_compute_dtype",
    "pytorch_lightning.strategies.deepspeed:remove_module_hooks",
    "pytorch_lightning.strategies:DeepSpeedStrategy._init_deepspeed_distributed",
    "pytorch_lightning.strategies:DeepSpeedStrategy._init_optimizers",
    "pytorch_lightning.strategies:DeepSpeedStrategy._setup_model_and_optimizer",
    "pytorch_lightning.strategies:DeepSpeedStrategy._initialize_deepspeed_inference",
    "pytorch_lightning.strategies:DeepSpeedStrategy._auto_select_batch_size",
    "pytorch_lightning.strategies:DeepSpeedStrategy._init_config_if_needed",
    "pytorch_lightning.loops.fit_loop:_FitLoop._should_accumulate",
    "pytorch_lightning.loops.fit_loop:_FitLoop.restarted_mid_epoch",
    "pytorch_lightning.loops.evaluation_loop:_EvaluationLoop._build_kwargs",
    "pytorch_lightning.loops.evaluation_loop:_EvaluationLoop._build_step_args_from_hook_kwargs",
    "pytorch_lightning.loops.prediction_loop:_PredictionLoop._build_kwargs",
    "pytorch_lightning.trainer.call:_call_strategy_hook",
    # averaging weights
    "pytorch_lightning.callbacks:WeightAveraging._swap_models",
    "pytorch_lightning.callbacks:WeightAveraging._copy_average_to_current",
    # what decides by logged values
    "pytorch_lightning.callbacks:ModelCheckpoint._monitor_candidates",
    "pytorch_lightning.callbacks:EarlyStopping._run_early_stopping_check",
    "pytorch_lightning.loops.training_epoch_loop:_TrainingEpochLoop._get_monitor_value",
    "pytorch_lightning.trainer.connectors.logger_connector.result:_ResultCollection._forked_name",
    "pytorch_lightning.trainer.connectors.logger_connector.result:_ResultCollection.valid_items",
    "pytorch_lightning.utilities.data:_update_dataloader",
    "pytorch_lightning.overrides.distributed:UnrepeatedDistributedSamplerWrapper",
    "pytorch_lightning.trainer.connectors.signal_connector:_SignalConnector.teardown",
    # torch
    "torch.distributed.distributed_c10d:_get_default_store",
    "torch._C:_current_graph_task_id",
]

SOURCES = {
    # What the engine is told through parameters, and through its optimizer's groups.
    "deepspeed.runtime.engine:DeepSpeedEngine._resolve_zero3_param_placement": [
        "ds_zero_placement_family",
        "autoep_expert",
        "ds_zero_partition_group_name",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._configure_moe_settings": [
        "self.expert_dp_process_group[group['name']]"
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.average_tensor": [
        "self.expert_dp_process_group[param.group_name]",
        "tensor.div_(dist.get_world_size(group=self.dp_process_group)",
    ],
    # Where partitions and half accumulated gradients lie.
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": [
        "self.round_robin_bit16_offsets",
        "self.round_robin_bit16_meta",
        "self.single_partition_of_fp32_groups",
        "self.params_in_partition",
        "self.all_grad_tensors[i]",
        "self.accumulated_grads_in_cpu[param_id]",
        "if self.micro_step_id > 0",
    ],
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": [
        "self.fp32_partitioned_groups_flat",
        "self.sub_group_to_group_id",
        "self.__param_id_to_grad_partition[param.ds_id]",
        "if self.micro_step_id == 0:  # don't accumulate",
    ],
    "deepspeed.runtime.zero.partition_parameters:Init": ["param.ds_zero_partition_rank ="],
    # Where logged values are kept between two decisions.
    "pytorch_lightning.trainer.connectors.logger_connector.result:_ResultCollection._get_cache": [
        "cache = result_metric._forward_cache",
        "cache = result_metric._computed",
    ],
    "pytorch_lightning.trainer.connectors.logger_connector.logger_connector:_LoggerConnector": [
        "on_step = self._first_loop_iter is not None",
        "self._callback_metrics.update(metrics)",
    ],
    # What WeightAveraging does with its model; its other methods are replaced.
    "pytorch_lightning.callbacks:WeightAveraging.on_train_batch_end": [
        "self._average_model.update_parameters(pl_module)"
    ],
    "pytorch_lightning.callbacks:WeightAveraging.on_validation_epoch_start": [
        "if self._average_model is not None:",
        "self._swap_models(pl_module)",
    ],
    "pytorch_lightning.callbacks:WeightAveraging.__init__": [
        "self._use_buffers = use_buffers",
        "self._kwargs = kwargs",
        "self._device",
    ],
    # Lightning divides the loss, so the engine must not.
    "pytorch_lightning.loops.optimization.automatic:_AutomaticOptimization._training_step": [
        "trainer.accumulate_grad_batches"
    ],
    "deepspeed.runtime.engine:DeepSpeedEngine": [
        "loss = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss"
    ],
}


def find(path: str) -> Any:
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("path", NAMES)
def test_name_exists(path: str) -> None:
    assert find(path) is not None


@pytest.mark.parametrize("path", list(SOURCES))
def test_source_still_says(path: str) -> None:
    source = inspect.getsource(find(path))
    for text in SOURCES[path]:
        assert text in source


def test_a_missing_name_is_noticed() -> None:
    with pytest.raises(AttributeError):
        find("deepspeed.utils.groups:_NO_SUCH_GROUP")
