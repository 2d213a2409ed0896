// Drive the page in a real Chromium: node test/browser.mjs ADDRESS CHROMIUM OUT_FOLDER IMAGE X,Y [QUERY]
// Leaves mask.png, cutout.png and page.png in OUT_FOLDER, and prints a JSON of what happened. X,Y are from 0 to 1.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

const [address, executablePath, out, image, at, query = ''] = process.argv.slice(2);
const [x, y] = at.split(',').map(Number);
mkdirSync(out, { recursive: true });
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] });
const context = await browser.newContext({ viewport: { width: 1120, height: 900 }, acceptDownloads: true });
const page = await context.newPage();
const problems = [];
page.on('pageerror', (error) => problems.push(String(error)));
const LIMIT = 240_000;
const state = (...names) => page.waitForFunction((wanted) => wanted.includes(document.body.dataset.state), names, { timeout: LIMIT });
const status = () => page.textContent('#status');
const message = async () => (await page.isVisible('#message')) ? page.textContent('#message') : null;
const download = async (selector, name) => {
  const [file] = await Promise.all([page.waitForEvent('download'), page.click(selector)]);
  await file.saveAs(join(out, name));
  return file.suggestedFilename();
};
const canvasBox = () => page.locator('#canvas').boundingBox();
const masked = () => page.waitForFunction(() => !document.querySelector('#save-mask').disabled, null, { timeout: LIMIT });
const spot = async (u, v) => { const box = await canvasBox(); return [box.x + u * box.width, box.y + v * box.height]; };
const file = (name, mimeType, buffer) => page.setInputFiles('#file', { name, mimeType, buffer });

const report = { problems };
try {
  // What is no image says so, even before the model is there.
  await page.goto(address + query);
  await file('notes.txt', 'text/plain', Buffer.from('not an image'));
  await page.waitForSelector('#message:not([hidden])');
  report.text = await message();
  await file('broken.jpg', 'image/jpeg', Buffer.from([0xff, 0xd8, 0xff, 0xe0, 1, 2, 3]));
  await page.waitForFunction(() => document.querySelector('#message').textContent.includes('broken.jpg'));
  report.broken = await message();
  await state('ready');
  report.ready = await status();
  report.isolated = await page.evaluate(() => crossOriginIsolated);
  await page.setInputFiles('#file', image);
  await state('encoded');
  report.encoded = await status();
  report.messageAfterAnImage = await message();

  await page.mouse.move(...(await spot(x, y)), { steps: 3 });
  await state('mask');
  report.hover = await status();
  report.savedByHover = await page.isEnabled('#save-mask');
  await page.mouse.click(...(await spot(x, y)));
  await masked();
  report.clicked = await status();
  await page.screenshot({ path: join(out, 'page.png') });
  report.maskName = await download('#save-mask', 'mask.png');
  report.cutoutName = await download('#save-cutout', 'cutout.png');

  await page.click('#undo');
  report.undoDisabled = await page.isDisabled('#undo');

  // A box by dragging, then a background point by a right click.
  await page.mouse.move(...(await spot(x - 0.3, y - 0.3)));
  await page.mouse.down();
  await page.mouse.move(...(await spot(x + 0.3, y + 0.3)), { steps: 5 });
  await page.mouse.up();
  await masked();
  await download('#save-mask', 'box.png');
  await page.mouse.click(...(await spot(0.98, 0.02)), { button: 'right' });
  await masked();
  report.boxAndBackground = await status();
  await page.click('#clear');
  report.clearDisabled = await page.isDisabled('#clear');

  // The same click by keys: the cross starts in the middle.
  await page.focus('#canvas');
  const steps = [Math.round((x - 0.5) / 0.01), Math.round((y - 0.5) / 0.01)];
  for (const [count, back, forth] of [[steps[0], 'ArrowLeft', 'ArrowRight'], [steps[1], 'ArrowUp', 'ArrowDown']]) {
    for (let i = 0; i < Math.abs(count); ++i) await page.keyboard.press(count < 0 ? back : forth);
  }
  if (!steps[0] && !steps[1]) { await page.keyboard.press('ArrowLeft'); await page.keyboard.press('ArrowRight'); }
  await page.keyboard.press('Enter');
  await masked();
  await page.waitForTimeout(500);
  const [byKey] = await Promise.all([page.waitForEvent('download'), page.keyboard.press('m')]);
  await byKey.saveAs(join(out, 'keys.png'));
  await page.keyboard.press('Escape');
  report.escapeClears = await page.isDisabled('#clear');

  // 100 megapixels, drawn as an SVG of that size so that no large file is needed.
  await file('huge.svg', 'image/svg+xml', Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" width="10000" height="10000"/>'));
  await page.waitForFunction(() => document.querySelector('#message').textContent.includes('huge.svg'));
  report.huge = await message();

  // Without a network, the page and the model load again.
  await context.setOffline(true);
  await page.reload();
  await state('ready');
  report.offline = await status();
  await context.setOffline(false);
} catch (error) {
  report.failure = `${error.message}\nstate ${await page.evaluate(() => document.body.dataset.state).catch(() => '?')}, message ${await message().catch(() => '?')}`;
  await page.screenshot({ path: join(out, 'failure.png') }).catch(() => null);
}
await browser.close();
writeFileSync(join(out, 'report.json'), JSON.stringify(report, null, 2));
console.log(JSON.stringify(report, null, 2));
process.exit(report.failure ? 1 : 0);
