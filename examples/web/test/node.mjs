// Segment an image with the real transformers.js in Node: node test/node.mjs MODEL_FOLDER IMAGE OUT.json X,Y [DTYPE]
// OUT.json has the predicted IoU of the three masks, and the best mask as rows of 0 and 1.
import { writeFileSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { AutoProcessor, RawImage, SamModel, env } from '@huggingface/transformers';

const [folder, file, out, point, dtype = 'fp32'] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(folder);
const model = await SamModel.from_pretrained(name, { dtype: { vision_encoder: dtype, prompt_encoder_mask_decoder: 'fp32' } });
const processor = await AutoProcessor.from_pretrained(name);
const image = await RawImage.read(file);
const inputs = await processor(image, { input_points: [[point.split(',').map(Number)]], input_labels: [[1]] });
const { iou_scores, pred_masks } = await model(inputs);
const [masks] = await processor.post_process_masks(pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes);
const scores = Array.from(iou_scores.data);
const [, , height, width] = masks.dims;
const best = scores.indexOf(Math.max(...scores));
const mask = Array.from(masks.data.slice(best * height * width, (best + 1) * height * width));
writeFileSync(out, JSON.stringify({ scores, width, height, dims: pred_masks.dims, mask }));
