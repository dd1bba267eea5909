// Fills a mask with transformers.js in Node, offline: compare the output with `unmask fill MODEL TEXT --top 3`.
//
//   npm install --ignore-scripts @huggingface/transformers
//   unmask export MODEL models/NAME --format onnx --int8
//   node transformers_js.mjs models NAME "The [MASK] of the list."
import { env, pipeline } from "@huggingface/transformers";

const [folder, name, text] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = `${folder}/`;
for (const dtype of ["fp32", "q8"]) {
  const fill = await pipeline("fill-mask", name, { dtype });
  const masked = text.replace("[MASK]", fill.tokenizer.mask_token);
  const ids = (await fill.tokenizer(masked)).input_ids.tolist()[0].map(Number);
  const candidates = (await fill(masked, { top_k: 3 })).map(({ token_str, score }) => [token_str, score.toFixed(5)]);
  console.log(JSON.stringify({ name, dtype, ids, candidates }));
}
