"""Words that other programs use for our options, so that an unknown option is answered with the right one.

It knows names only: which options a command has is passed in.  To add a word: write it into the row of its option.
"""

from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from typing import NamedTuple

ALIKE = 0.85  # how alike a word and one of OTHER_NAMES are spelt, so that it counts as misspelt


class Row(NamedTuple):
    """option: as it is typed, a value included; empty if no option does this.   words: its names elsewhere.

    note: a sentence that follows in the answer.
    """

    option: str
    words: str
    note: str = ""

    @property
    def name(self) -> str:
        return self.option.split(" ")[0]


def plain(word: str) -> str:
    """The name in a word of a command line: --Learning-Rate=3 -> learning_rate."""
    return word.lstrip("-").split("=")[0].replace("-", "_").lower()


def answer(word: str, names: Collection[str]) -> str | None:
    """What to say about a word where the options have these names; None if it stands for none of them.

    >>> answer("--learning-rate", ["lr", "epochs"])
    'Did you mean --lr?'
    """
    row = find(word, names)
    if row is None or not row.option:
        return row and row.note
    return f"Did you mean --{row.option}?" + (f" {row.note}" if row.note else "")


def find(word: str, names: Collection[str]) -> Row | None:
    """The row that says what a word means where the options have these names, or why there is no such option."""
    return next((row for row in _rows(word) if not row.option or row.name.removeprefix("no_") in names), None)


def respelt(word: str) -> str:
    """The word of the table that is spelt most like this one; empty if there is none.

    >>> respelt("--guidance_scal")
    'guidance_scale'
    """
    return next(iter(get_close_matches(plain(word), OTHER_NAMES, n=1, cutoff=ALIKE)), "")


def meanings(word: str) -> list[str]:
    """The options that a word may stand for, in whichever command they are; the one of its own name first.

    >>> meanings("--cfg-scale")
    ['cfg_scale', 'guidance']
    """
    return [plain(word), *(row.name.removeprefix("no_") for row in _rows(word) if row.option)]


def _rows(word: str) -> list[Row]:
    return [row for row, words in _words() if plain(word) in words]


@cache
def _words() -> list[tuple[Row, set[str]]]:
    return [(row, set(row.words.split())) for row in SYNONYMS]


# A word may stand in several rows: the first whose option the command has is the answer.
# fmt: off
SYNONYMS = (
    # what is sampled
    Row("steps", "num_inference_steps inference_steps ddim_steps ddim_timesteps ddpm_num_inference_steps "
        "sampling_steps sample_steps sampling_timesteps num_sampling_steps timestep_respacing n_steps num_steps nfe "
        "evaluations student_steps"),
    Row("timesteps", "t n_t n_steps num_steps n_timesteps num_timesteps num_train_timesteps train_timesteps timestep "
        "max_timesteps total_timesteps time_steps noise_steps num_noise_steps diffusion_steps num_diffusion_steps "
        "num_diffusion_timesteps ddpm_num_steps ddpm_steps diffusion_timesteps",
        "It is T, the length of the noising process; steps of training are --max_steps."),
    Row("max_steps", "steps n_steps num_steps train_steps training_steps num_train_steps num_training_steps "
        "max_train_steps train_num_steps total_steps iterations iters n_iter n_iters niter num_iter num_iters "
        "num_iterations max_iter max_iters total_iters max_iterations train_iters",
        "The length of a run is --epochs or --minutes."),
    Row("guidance", "guidance_scale guidance_weight guidance_strength guide_scale cfg cfg_scale cfg_weight "
        "cfg_strength classifier_free_guidance classifier_guidance classifier_scale cond_scale w scale"),
    Row("guidance_interval", "cfg_interval guidance_range guidance_start guidance_end cfg_range"),
    Row("guide_checkpoint", "guide autoguidance autoguidance_checkpoint gnet guiding_model"),
    Row("classes", "class class_id class_ids class_label class_labels class_idx label labels digit digits y cls "
        "condition prompt prompts"),
    Row("num_images", "num_samples n_samples nsamples num_sample n_images nimages num_imgs n_imgs n_sample "
        "number_of_samples sample_count num_fid_samples num_generated n_generate num_gen num_examples count n"),
    Row("num_samples", "num_images n_samples nsamples num_sample n_images n_sample sample_batch_size sample_size "
        "num_sample_images eval_batch_size num_generated_images"),
    Row("eta", "ddim_eta ddim_sampling_eta s_churn churn stochasticity"),
    Row("sampler", "solver sampling_method sampler_name sample_method sampling_algorithm scheduler noise_scheduler "
        "algorithm"),
    Row("sampler ddim", "ddim use_ddim ddim_sampling"),
    Row("sampler ddpm", "ddpm use_ddpm ancestral"),
    Row("grid", "timestep_spacing spacing time_grid sigma_schedule karras use_karras_sigmas"),
    Row("classes none", "unconditional uncond unconditioned no_class no_classes no_labels"),
    Row("indices", "index image_index sample_index seeds"),
    Row("show_intermediate", "save_intermediate save_intermediates intermediate show_steps save_steps show_process "
        "visualize_steps"),
    Row("output film.gif", "gif save_gif make_gif animate animation video movie mp4"),
    Row("output samples.npz", "npz save_npz to_npz"),
    Row("weights", "use_ema no_ema model_weights"),
    Row("init", "init_image init_img input_image image img input source img2img"),
    Row("strength", "denoising_strength noise_strength img2img_strength"),
    Row("mask", "mask_image mask_path"),
    Row("inpaint", "inpainting inpaint_image"),
    # files
    Row("output_dir", "output out outdir out_dir output_folder output_path out_path save_dir save_folder save_path "
        "result_dir results_dir results_folder results result_folder log_dir logdir logging_dir ckpt_dir "
        "checkpoint_dir checkpoints_dir model_dir exp_dir exp_name experiment experiment_name run_name run_dir "
        "work_dir workdir sample_dir samples_dir project_dir"),
    Row("output", "out outfile out_file outdir out_dir output_dir output_path output_file output_folder out_path "
        "save save_as save_dir save_path save_to savepath result_dir results_dir results_folder sample_dir "
        "samples_dir"),
    Row("save_path", "output out out_file outfile out_dir output_dir output_path output_file save save_as save_dir "
        "figure fig_path savepath"),
    Row("json", "output out output_file save save_path results_file"),
    Row("checkpoint", "ckpt ckpt_path ckpt_file checkpoint_path checkpoint_file model model_path model_file "
        "model_dir model_checkpoint model_id model_name_or_path pretrained pretrained_model "
        "pretrained_model_name_or_path pretrained_model_path weights_path weight_path load load_path load_model "
        "load_checkpoint resume network pkl network_pkl teacher teacher_path run run_dir output_dir"),
    Row("resume", "resume_from resume_from_checkpoint resume_checkpoint resume_path resume_ckpt resume_training "
        "continue continue_train continue_training restore restart load load_path load_checkpoint ckpt ckpt_path "
        "checkpoint checkpoint_path load_milestone milestone",
        "A new run starts from other weights by --init_from."),
    Row("init_from", "finetune fine_tune finetune_from pretrained pretrained_path pretrained_model "
        "pretrained_weights pretrained_model_name_or_path model_path model_name_or_path load_weights load_model "
        "transfer init_weights"),
    Row("overwrite", "force overwrite_output_dir clobber"),
    Row("dataset", "data dataset_name data_name data_set train_data dataset_type"),
    Row("data_dir", "data_path data_root data_folder dataset_dir dataset_path dataset_root dataset_folder root "
        "root_dir train_dir train_path train_data_dir train_data_path train_folder image_dir image_path image_folder "
        "images_dir img_dir img_path img_folder imgs_dir images folder input_dir datapath datadir dataroot",
        "Your own images also need --dataset folder."),
    Row("reference", "ref ref_path ref_dir ref_stats ref_batch real real_dir real_images fid_ref reference_dir "
        "stats_path"),
    Row("images", "samples sample_path samples_dir fake fake_dir generated generated_dir sample_batch input "
        "input_dir"),
    Row("features", "feature_extractor feature_network inception detector"),
    # data
    Row("image_size", "img_size im_size imgsize imsize image_dim img_dim image_resolution img_resolution resolution "
        "res size crop_size input_size image_width image_height side"),
    Row("hflip", "augment aug augmentation augmentations data_augmentation use_augmentation flip random_flip "
        "random_hflip horizontal_flip augment_horizontal_flip xflip mirror"),
    Row("random_crop", "crop randomcrop center_crop no_center_crop"),
    Row("workers", "num_workers n_workers dataloader_num_workers num_worker loader_workers data_workers nworkers"),
    Row("splits", "split train_split subset"),
    Row("background", "bg bg_color background_color background_colour"),
    # the process
    Row("schedule", "beta_schedule noise_schedule noise_schedule_type schedule_name schedule_type ddpm_beta_schedule "
        "scheduler noise_scheduler beta_scheduler var_schedule"),
    Row("beta_start", "beta1 beta_1 beta_min beta_low min_beta linear_start start_beta"),
    Row("beta_end", "beta2 beta_2 beta_t beta_max beta_high max_beta linear_end end_beta"),
    Row("logsnr_shift", "noise_shift schedule_shift snr_shift timestep_shift flow_shift shift"),
    Row("prediction", "prediction_type pred_type pred predict objective parameterization parametrization mean_type "
        "model_mean_type model_output target target_type model_target"),
    Row("prediction x0", "predict_xstart predict_x0 pred_x0 x0_pred"),
    Row("prediction v", "v_prediction predict_v v_pred use_v_prediction"),
    Row("loss", "loss_type loss_fn loss_function criterion"),
    Row("loss_weight min_snr", "min_snr snr_gamma min_snr_gamma min_snr_loss_weight use_min_snr"),
    Row("loss_weight", "loss_weighting weighting weighting_scheme p2_loss_weight_gamma"),
    Row("timestep_distribution", "schedule_sampler timestep_sampler timestep_sampling time_sampling t_sampler "
        "time_distribution t_distribution"),
    # the network
    Row("base_channels", "hidden_channels hidden_dim hidden_dims hidden_size hidden hidden_units model_channels "
        "model_dim num_channels n_channels nb_channels unet_dim unet_channels unet_base_channels init_dim dim dims "
        "channels base_dim base_width base_ch width ch nf ngf n_feat n_features num_features num_filters n_filters "
        "block_out_channels start_channels initial_channels filters"),
    Row("channel_mult", "channel_mults channel_multiplier channel_multipliers channels_mult ch_mult ch_mults "
        "dim_mult dim_mults mults multipliers block_out_channels width_mult channels_list down_channels"),
    Row("layers_per_block", "num_res_blocks n_res_blocks num_resblocks res_blocks resnet_blocks num_blocks n_blocks "
        "num_layers n_layers layers depth blocks_per_level"),
    Row("time_emb_dim", "time_embedding_dim time_embed_dim time_embedding time_embedding_size time_emb_size time_dim "
        "t_dim t_emb_dim temb_dim emb_dim embed_dim embedding_dim time_channels time_hidden_dim"),
    Row("attention_levels", "attention_resolutions attn_resolutions attn_levels attention attn use_attention "
        "attention_layers attn_layers full_attn attention_at"),
    Row("attention_heads", "num_heads n_heads nheads heads num_attention_heads attn_heads num_head_channels "
        "attention_head_dim head_dim attn_dim_head"),
    Row("activation", "act act_fn act_func act_layer activation_fn activation_function nonlinearity non_linearity"),
    Row("patch_size", "patch unshuffle pixel_unshuffle downsample_factor"),
    Row("dropout", "drop drop_rate dropout_rate dropout_prob p_dropout"),
    Row("class_cond", "conditional cond class_conditional conditioning label_cond num_classes n_classes "
        "num_class_embeds use_labels cond_model"),
    Row("no_class_cond", "unconditional uncond unconditioned no_labels"),
    Row("label_dropout", "p_uncond uncond_prob unconditional_prob cfg_prob cfg_dropout cond_drop_prob cond_dropout "
        "class_dropout class_dropout_prob class_drop_prob drop_prob label_drop_prob label_drop guidance_dropout "
        "drop_label_prob context_drop_prob"),
    Row("checkpoint_activations", "gradient_checkpointing grad_checkpoint grad_checkpointing use_checkpoint "
        "activation_checkpointing use_gradient_checkpointing"),
    # the run
    Row("epochs", "num_epochs n_epochs nepochs n_epoch num_epoch max_epochs max_epoch train_epochs training_epochs "
        "num_train_epochs total_epochs epoch ep"),
    Row("minutes", "max_minutes time_limit time_budget max_time hours max_hours duration seconds train_time"),
    Row("batch_size", "batch bs bsz batchsize batch_sz train_batch_size eval_batch_size test_batch_size "
        "sample_batch_size total_batch_size global_batch_size per_device_train_batch_size batch_gpu minibatch "
        "mini_batch n_batch num_batch"),
    Row("accumulate", "gradient_accumulation_steps gradient_accumulation gradient_accumulate_every grad_accum "
        "grad_accumulation accum accum_iter accum_steps accumulation_steps accumulate_grad_batches microbatch "
        "micro_batch"),
    Row("lr", "learning_rate learningrate learn_rate max_lr init_lr initial_lr base_lr train_lr peak_lr step_size "
        "adam_lr lrate"),
    Row("optimizer", "optim optimiser opt optimizer_type optimizer_name"),
    Row("optimizer adamw", "weight_decay wd adam_weight_decay adamw"),
    Row("ema_decay", "ema ema_rate ema_beta ema_mu ema_momentum ema_max_decay ema_power ema_halflife use_ema no_ema",
        "The weights are always averaged; 0 turns that off."),
    Row("grad_clip", "max_grad_norm max_norm clip_grad clip_grad_norm clip_norm grad_norm grad_clip_norm "
        "gradient_clip gradient_clip_val gradient_clipping clip clipping"),
    Row("precision bf16", "bf16 bfloat16 use_bf16 amp use_amp autocast half mixed"),
    Row("precision fp16", "fp16 use_fp16 float16"),
    Row("precision", "mixed_precision dtype amp_dtype tf32 mixed_precision_type"),
    Row("compile", "torch_compile use_compile jit"),
    Row("seed", "random_seed rng_seed manual_seed seed_value random_state global_seed"),
    Row("device", "gpu gpus gpu_id gpu_ids cuda cpu mps use_cuda use_gpu use_cpu no_cuda no_gpu accelerator"),
    Row("sample_interval", "sample_every sample_freq sample_frequency sample_period sample_epochs "
        "sample_every_n_epochs save_images_epochs save_image_epochs save_and_sample_every save_sample_every "
        "sampling_interval image_interval vis_interval eval_epochs validation_epochs generate_every plot_every"),
    Row("save_interval", "save_every save_freq save_frequency save_period save_epochs save_every_n_epochs "
        "save_model_epochs save_model_every ckpt_interval ckpt_every ckpt_freq checkpoint_interval checkpoint_every "
        "checkpoint_freq checkpointing_steps save_steps snap snapshot_interval"),
    Row("keep_last", "save_total_limit checkpoints_total_limit max_checkpoints keep_checkpoints num_checkpoints "
        "save_top_k"),
    Row("keep_best", "save_best save_best_only best_only save_best_and_latest_only"),
    Row("eval_interval", "eval_every eval_freq eval_steps fid_every fid_interval evaluate_every val_interval "
        "validate_every calculate_fid"),
    Row("eval_images", "num_fid_samples eval_samples num_eval_images num_eval_samples fid_samples"),
    Row("log", "report_to log_with logger loggers tracker trackers logging track with_tracking logging_tool"),
    Row("log tensorboard", "tensorboard tb use_tensorboard tensorboard_dir tb_dir tensorboard_logdir use_tb"),
    Row("log wandb", "wandb use_wandb wandb_project wandb_entity wandb_name wandb_run_name wandb_mode project "
        "tracker_project_name"),
    Row("config", "config_file config_path cfg_file yaml options_file"),
    Row("dry_run", "print_config show_config debug"),
    Row("what schedules", "schedules show_schedules compare compare_schedules plot_schedules"),
    Row("", "num_gpus n_gpus n_gpu ngpu ngpus world_size num_processes nproc nproc_per_node multi_gpu distributed "
        "ddp local_rank launcher nnodes",
        "Several processes are started by torchrun: torchrun --nproc_per_node=2 ..."),
    Row("", "lr_scheduler lr_schedule lr_warmup lr_warmup_steps lr_warmup_epochs warmup warmup_steps warmup_epochs "
        "lr_decay lr_decay_steps min_lr scheduler_type lr_policy cosine_lr",
        "The learning rate warms up and decays by itself; --lr of train is its peak."),
    Row("", "print_completion completion completions install_completion show_completion",
        "The completion of a shell is printed by the program itself: tiny-diffusion --print_completion bash"),
)
# fmt: on
OTHER_NAMES = sorted({word for row in SYNONYMS for word in row.words.split() if len(word) > 3})
