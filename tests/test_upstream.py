"""Each private name of other libraries that the package relies on is listed here, and still there.

The version ranges in pyproject.toml are tight for this reason; when one is widened, this test says
what to look at first.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
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
    "deepspeed.utils.groups:_WORLD_GROUP",
    "deepspeed.utils.groups:_release_process_group_references",
    "deepspeed.ops:__compatible_ops__",
    # skipping a step
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.check_overflow",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._optimizer_step",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._update_scale",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._release_preflattened_grad_buffers",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
    "_lazy_init_hp_params_optimizer_state",
    "deepspeed.runtime.utils:all_gather_dp_groups",
    "torch.nn.parallel.distributed:DistributedDataParallel._active_ddp_module",
    "torch.optim.optimizer:_global_optimizer_pre_hooks",
    "torch.optim.optimizer:_global_optimizer_post_hooks",
    "torch:_foreach_norm",
    "torch:_foreach_copy_",
    "torch.nn.modules.batchnorm:_BatchNorm",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._get_preflattened_grad_partition",
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
    "pytorch_lightning:Trainer._run",
    "lightning_fabric.utilities.data:_set_sampler_epoch",
    "pytorch_lightning.trainer.connectors.data_connector:_request_dataloader",
    "pytorch_lightning.trainer.connectors.data_connector:_resolve_overfit_batches",
    "pytorch_lightning.trainer.connectors.data_connector:_DataConnector._prepare_dataloader",
    "pytorch_lightning.loops.training_epoch_loop:_TrainingEpochLoop._build_kwargs",
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
    "torch.distributed.distributed_c10d:_coalescing_manager",
    "torch.distributed.distributed_c10d:_world",
    "torch.distributed:ProcessGroup._get_backend",
    "torch.distributed:ProcessGroup.abort",
    "torch._C:_current_graph_task_id",
    "torch._C:_will_engine_execute_node",
    "torch._C:_dispatch_tls_local_exclude_set",
    "torch._C:_dispatch_tls_local_include_set",
    "torch._C:_ForceDispatchKeyGuard",
    "torch.utils._pytree:tree_map",
    "torch.nn:Module._call_impl",
    "lightning_fabric.utilities.data:_set_sampler_epoch",
    "torch.utils.data:DataLoader._index_sampler",
    # transformers' experts interface
    "transformers.integrations.moe:_default_apply_gate",
    "transformers.integrations.moe:ExpertsInterface.register",
    "transformers.modeling_utils:PreTrainedModel._load_pretrained_model",
    "transformers.modeling_utils:PreTrainedModel._from_config",
    "transformers.core_model_loading:rename_source_key",
    "transformers.core_model_loading:revert_weight_conversion",
    "transformers.core_model_loading:PrefixChange",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:WeightConverter",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.core_model_loading:MergeModulelist",
    "transformers.core_model_loading:Concatenate",
    "transformers.core_model_loading:Interleave",
    "transformers.core_model_loading:Chunk",
    "transformers.core_model_loading:Transpose",
    "transformers.modeling_utils:PreTrainedModel.save_pretrained",
    "transformers.modeling_utils:PreTrainedModel.push_to_hub",
    "transformers.modeling_utils:PreTrainedModel.set_experts_implementation",
    "torch:_assert_async",
    # others
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3."
    "_finalize_offload_gradient_accumulation",
    "pytorch_lightning.core.module:LightningModule._on_before_batch_transfer",
    "pytorch_lightning.strategies:DeepSpeedStrategy._create_default_config",
    "pytorch_lightning.trainer.connectors.logger_connector.result:_ResultCollection",
    "torchmetrics:Metric._copy_state_dict",
    # what tells a layer how it is being traced
    "torch._dynamo:assume_constant_result",
    "torch._dynamo:graph_break",
    "torch._dynamo.symbolic_convert:InstructionTranslator.current_tx",
]

SOURCES = {
    # What ends the collectives that other ranks never join.
    "torch.distributed.distributed_c10d:_abort_process_group": [
        "pg._get_backend(",
        "_world.pg_names",
        "pg_to_abort.abort()",
    ],
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
    # What this package does instead of buckets.
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.setup_buckets": [
        "if not self.ready_for_gradients:",
        "self.micro_step_id += 1",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.reduce_gradients": [
        "if not self.overlap_comm:",
        "self.reduce_ready_partitions_and_remove_grads(param, i)",
        "self.overlapping_partition_gradients_reduce_epilogue()",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
    "reduce_ready_partitions_and_remove_grads": [
        "if self.partition_gradients or self.is_gradient_accumulation_boundary()",
        "self.reduce_independent_p_g_buckets_and_remove_grads(param, i)",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
    "reduce_independent_p_g_buckets_and_remove_grads": [
        "if param.numel() == 0:",
        'if not getattr(param, "ds_grad_is_ready", True):',
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.process_gradients": [
        "self.setup_buckets()",
        "self.reduce_ready_partitions_and_remove_grads(param, i)",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
    "independent_gradient_partition_epilogue": [
        "self.reduce_ipg_grads()",
        "self.all_grad_tensors[i] = self.get_all_grad_tensors(self.params_in_partition[i]",
        "self.averaged_gradients[i] = self.get_flat_partition(",
        "self._clear_param_grad_only()",
    ],
    # What the step at once does instead, and what the other step leaves to methods.
    "torch.optim.optimizer:Optimizer": [
        "self._optimizer_step_pre_hooks",
        "self._optimizer_step_post_hooks",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step": [
        "self.micro_step_id = INITIAL_MICRO_STEP_ID",
        "self._global_grad_norm = scaled_global_grad_norm / prev_scale",
        "self.zero_grad(set_to_none=True)",
        "self._release_preflattened_grad_buffers(i)",
        "bit16_partitions[partition_id].data.copy_(fp32_partition.data)",
        "all_gather_dp_groups(groups_flat=self.bit16_groups_flat,",
        "self._update_model_bit16_weights(i)",
        "self.check_overflow(partition_gradients=self.partition_gradients)",
        "and is_invalid_grad_norm(scaled_global_grad_norm):",
        "flat_grad_partition = self._get_preflattened_grad_partition(i)",
        "flat_grad_partition.to(self.single_partition_of_fp32_groups[i].dtype)",
        "self.single_partition_of_fp32_groups[i].grad = single_grad_partition",
        "self.unscale_and_clip_grads([single_grad_partition], scaled_global_grad_norm)",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm": [
        "self.get_grad_norm_direct(self.averaged_gradients[i], self.params_in_partition[i])",
    ],
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_grad_norm_direct": [
        'if not getattr(g, "_zero_padding", False)',
    ],
    "torch.optim:Adam": [
        "_step_supports_amp_scaling",
        'grad_scale=getattr(self, "grad_scale", None)',
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
        "self._current_fx:",
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
        "self._latest_update_step =",
        "self._latest_update_epoch =",
    ],
    # Lightning divides the loss, so the engine must not.
    "pytorch_lightning.loops.optimization.automatic:_AutomaticOptimization._training_step": [
        "trainer.accumulate_grad_batches"
    ],
    "deepspeed.runtime.engine:DeepSpeedEngine": [
        "loss = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss"
    ],
    # Attributes of objects.
    "deepspeed.runtime.zero.stage_1_and_2": [
        "self._grad_acc_hooks =",
        "self._hp_optimizer_states_linked =",
    ],
    "deepspeed.runtime.zero.stage3": ["self._grad_acc_hooks =", "self._offload_boundary_param_ids"],
    "pytorch_lightning.trainer.trainer:Trainer.__init__": [
        "self._accelerator_connector =",
        "self._checkpoint_connector =",
        "self._data_connector =",
        "self._logger_connector =",
        "self._signal_connector =",
    ],
    "pytorch_lightning.loops.fit_loop:_FitLoop": [
        "self._combined_loader:",
        "self._data_fetcher:",
        "self._data_source =",
        "trainer._last_val_time =",
    ],
    "pytorch_lightning.callbacks:ModelCheckpoint.__init__": ["self._last_global_step_saved ="],
    "pytorch_lightning.trainer.trainer": ["def _active_loop("],
    "pytorch_lightning.loops.evaluation_loop:_EvaluationLoop": [
        "self._combined_loader:",
        "self._results =",
    ],
    "pytorch_lightning.loops.training_epoch_loop:_TrainingEpochLoop": [
        "self._batches_that_stepped",
        "self._results =",
    ],
    "pytorch_lightning.core.module": [
        "self._compiler_ctx:",
        "self._current_fx_name:",
        "self._device_mesh:",
    ],
    "pytorch_lightning.plugins.precision.deepspeed": ["self._desired_dtype ="],
    "pytorch_lightning.callbacks.model_checkpoint": ["self._enable_version_counter ="],
    "pytorch_lightning.callbacks.model_summary": ["self._max_depth:"],
    "pytorch_lightning.callbacks.throughput_monitor": ["self._throughputs:"],
    "pytorch_lightning.loggers.tensorboard": ["self._log_graph ="],
    "pytorch_lightning.strategies.ddp": ["self._timeout:", "self._layer_sync"],
    "lightning_fabric.utilities.distributed": ["self._sampler ="],
    "torchmetrics.metric": ["self._defaults:"],
    "jsonargparse._core": ["_subcommands_action"],
    "torch.optim.lr_scheduler": ["_wrapped_by_lr_sched"],
    # How transformers calls a registered implementation, and what experts say of themselves.
    "transformers.integrations.moe:use_experts_implementation": [
        "self.config = config",
        "self.has_gate = has_gate",
        "self.has_bias = has_bias",
        "self.is_transposed = is_transposed",
        "self.is_concatenated = is_concatenated",
        "experts_interface.get_interface(self.config._experts_implementation, original_forward)",
        "return experts_forward(self, *args, **kwargs)",
        "experts_class._apply_gate = _default_apply_gate",
    ],
    "transformers.integrations.moe:_default_apply_gate": [
        "gate, up = gate_up_out.chunk(2, dim=-1)",
        "return self.act_fn(gate) * up",
    ],
    "transformers.integrations.moe:grouped_mm_experts_forward": [
        "sentinel_mask = (expert_ids_g >= self.num_experts)"
    ],
    # What exporting leaves out, and what it says about conversions.
    "transformers.modeling_utils": [
        "self.all_tied_weights_keys =",
        "_keys_to_ignore_on_save:",
    ],
    "transformers.core_model_loading:revert_weight_conversion": [
        'getattr(model, "_weight_conversions", None)',
        "rename_source_key(original_key, renamings, converters, reverse=True)",
    ],
    # How weights are assigned, and what is then left alone.
    "transformers.core_model_loading:set_param_for_module": ["setattr(module_obj, param_name,"],
    "transformers.core_model_loading:convert_and_load_state_dict_in_model": [
        'is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD")'
    ],
    "transformers.modeling_utils:PreTrainedModel._initialize_weights": [
        'if getattr(module, "_is_hf_initialized", False):'
    ],
    "transformers.activations:SiLUActivation": ["return nn.functional.silu(input)"],
    "transformers.activations:GELUActivation": [
        "self.act = nn.functional.gelu",
        "return self.act(input)",
    ],
    "torch.nn.modules.module": [
        "_forward_hooks:",
        "_forward_pre_hooks:",
        "_backward_hooks:",
        "_backward_pre_hooks:",
        "_compiled_call_impl",
        "_forward_hooks",
        "_forward_pre_hooks",
        '"_non_persistent_buffers_set"',
    ],
    "torch._dynamo.eval_frame": ["self._orig_mod ="],
    "torch._dynamo.symbolic_convert": ["self.one_graph", "self.error_on_graph_break"],
}

OTHERS = {"_actions", "_asdict", "_current_frames", "_exit", "_fastmoe_origin", "_getframe"}
"""Names of the standard library, unchanged for ten years, and one of our own."""

PACKAGE = Path(__file__).parents[1] / "lightning_fastmoe"


def find(path: str) -> Any:
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in filter(None, attributes.split(".")):
        found = getattr(found, attribute)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> tuple[set[str], dict[str, int]]:
    """The private names that a module defines, and those that it uses, with a line."""
    own: set[str] = set()
    used: dict[str, int] = {}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
                own.add(name)
            case ast.Attribute(attr=name, lineno=line):
                used[name] = line
            case ast.ImportFrom(names=names, lineno=line):
                used.update((alias.name, line) for alias in names)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
                lineno=line,
            ):
                used[name] = line
    return own, {name: line for name, line in used.items() if is_private(name)}


def unlisted(trees: dict[str, ast.AST]) -> Iterator[str]:
    """Private names of others that modules use, and that are listed nowhere above."""
    found = {path: private_names(tree) for path, tree in trees.items()}
    own = set().union(*(names for names, _ in found.values()))
    listed = "\n".join([*NAMES, *(text for texts in SOURCES.values() for text in texts)])
    for path, (_, used) in found.items():
        for name, line in used.items():
            if name not in own and name not in OTHERS and name not in listed:
                yield f"{path}:{line}: {name}"


def test_every_private_name_in_use_is_listed() -> None:
    files = {str(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert list(unlisted(files)) == []


def test_a_name_that_is_not_listed_is_found() -> None:
    tree = ast.parse("from torch import _secret\n\ndef _own(x):\n    return _own(x)._hidden\n")
    assert list(unlisted({"a.py": tree})) == ["a.py:1: _secret", "a.py:4: _hidden"]


@pytest.mark.parametrize("path", NAMES)
def test_name_exists(path: str) -> None:
    module, _, attributes = path.partition(":")
    owner, _, name = attributes.rpartition(".")
    # Some are None until a run begins.
    assert find(module) is not None if not name else hasattr(find(f"{module}:{owner}"), name)


@pytest.mark.parametrize("path", list(SOURCES))
def test_source_still_says(path: str) -> None:
    source = inspect.getsource(find(path))
    for text in SOURCES[path]:
        assert text in source


def test_a_missing_name_is_noticed() -> None:
    with pytest.raises(AttributeError):
        find("deepspeed.utils.groups:_NO_SUCH_GROUP")
