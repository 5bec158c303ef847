// node templates.mjs URL WORKFLOWS OUT open|lay-out|run: prints {template: {nodes, missing, errors, pictures}} as JSON.
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'

const { chromium } = createRequire(process.env.NODE_PATH + '/')('playwright-core')
const [url, folder, out, mode] = process.argv.slice(2)

const browser = await chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox'] })
let page, errors

async function open() {
  await page?.close()
  page = await browser.newPage({ viewport: { width: 1920, height: 1080 } })
  errors = []
  page.on('console', m => { if (m.type() === 'error' && /concept/i.test(m.text() + m.location().url)) errors.push(m.text()) })
  page.on('pageerror', e => errors.push(String(e)))
  await page.goto(url, { waitUntil: 'domcontentloaded' })
  await page.waitForFunction(() => window.app?.graph && window.app.extensionManager, null, { timeout: 120000 })
  await page.waitForTimeout(2500)
  await page.evaluate(() => window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false))
}

// One row per picture: prompt, sampler, decoder, save; what leads to them in columns on the left.
async function layOut(api, note) {
  await page.evaluate(async ({ api, note }) => {
    await window.app.loadApiJson(api, 'template')
    const graph = window.app.graph
    const columns = [['ConceptLoadToyWorld', 'CheckpointLoaderSimple', 'ConceptLoadToyReferences', 'LoadImage', 'ConceptLoadCarrier', 'ConceptLoadDictionary', 'ConceptTrainDictionary'],
      ['ConceptMakeSet', 'BatchImagesNode', 'InvertMask', 'BatchMasksNode'], ['ConceptLearnTokens', 'ConceptLearnResiduals', 'ConceptLearnKV', 'ConceptLearnScene', 'ConceptLearnLora', 'ConceptLearnModulation', 'ConceptExtractFeatures', 'ConceptRefineForPrompt'],
      ['ConceptMatchFeatures', 'ConceptMatchPoint', 'ConceptShowFeatures', 'ConceptTransferMask', 'ConceptFindPicture', 'ConceptEncodeWords', 'ConceptPruneCode', 'MaskToImage', 'ImageFromBatch'],
      ['ConceptApplyCarrier', 'ConceptMixCarriers', 'ConceptFuseLoras', 'ConceptShowAttention', 'VAEDecode', 'PreviewImage', 'PreviewAny', 'ConceptInspectCarrier', 'ConceptSaveCarrier', 'CLIPTextEncode', 'EmptyLatentImage']]
    const size = node => {
      const least = node.computeSize()
      const text = node.widgets?.some(w => w.type === 'customtext')
      const picture = ['PreviewImage', 'SaveImage'].includes(node.type)
      const link = picture ? graph.links.get(node.inputs[0].link) : null
      const origin = link ? graph.getNodeById(link.origin_id).type : ''
      const written = origin.startsWith('Concept') && origin !== 'ConceptLoadToyReferences' // words and numbers are in it
      const report = node.type === 'PreviewAny'
      node.setSize([Math.max(least[0], written ? 460 : text || report ? 330 : 250),
        Math.max(least[1], text ? 110 : 0, written ? 330 : picture ? 270 : 0, report ? 200 : 0)])
      return node.size
    }
    const rows = graph.nodes.filter(n => n.type === 'SaveImage').map(save => {
      const before = (node, name) => graph.getNodeById(api[node.id].inputs[name][0])
      const decode = before(save, 'images')
      const sampler = before(decode, 'samples')
      return [before(sampler, 'positive'), sampler, decode, save]
    })
    const inRow = new Set(rows.flat())
    let x = 0
    for (const types of columns) {
      let y = 0, wide = 0
      const here = graph.nodes.filter(n => types.includes(n.type) && !inRow.has(n))
      for (const node of here.sort((a, b) => types.indexOf(a.type) - types.indexOf(b.type))) {
        const [w, h] = size(node)
        node.pos = [x, y]
        y += h + 60 + (node.type.startsWith('Concept') ? 50 : 0) // what it says of its run
        y += node.type.startsWith('ConceptLearn') || node.type === 'ConceptFuseLoras' ? 204 : 0 // the live preview
        wide = Math.max(wide, w)
      }
      if (here.length) x += wide + 70
    }
    rows.forEach((row, i) => {
      let at = x
      for (const node of row) {
        const [w] = size(node)
        node.pos = [at, i * 350]
        at += w + 60
      }
    })
    for (const node of graph.nodes) for (const w of node.widgets ?? []) if (w.name === 'control_after_generate') w.value = 'fixed'
    const group = (title, nodes, color) => {
      const box = new window.LiteGraph.LGraphGroup(title)
      box.color = color
      graph.add(box)
      const low = [0, 1].map(i => Math.min(...nodes.map(n => n.pos[i])) - (i ? 85 : 20))
      box.pos = low
      box.size = [0, 1].map(i => Math.max(...nodes.map(n => n.pos[i] + n.size[i])) + 20 - low[i])
    }
    const kind = rows.length ? api[4]?.class_type.startsWith('ConceptLearn') ? 'learn' : 'load' : 'match'
    group(kind, graph.nodes.filter(n => !inRow.has(n)), '#3f789e')
    if (rows.length) group('use', [...inRow], '#88a77b')
    const words = window.LiteGraph.createNode('MarkdownNote')
    graph.add(words)
    words.widgets[0].value = note
    words.setSize([620, 120])
    words.pos = [0, -260]
  }, { api, note })
}

const covered = () => page.evaluate(() => { // nodes with their titles, which lie above them
  const boxes = window.app.graph.nodes.map(n => [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])
  return boxes.flatMap(([a, x, y, right, bottom], i) => boxes.slice(i + 1)
    .filter(([, l, t, r, b]) => x < r && l < right && y < b && t < bottom).map(([b]) => `${a} covers ${b}`))
})

async function run() { // what a person sees after pressing Run
  await page.evaluate(() => window.app.queuePrompt(0, 1))
  let left
  do {
    await page.waitForTimeout(1500)
    const queue = await (await fetch(`${url}/queue`)).json()
    left = queue.queue_running.length + queue.queue_pending.length
  } while (left)
  await page.waitForTimeout(1500)
}

const report = {}
for (const file of fs.readdirSync(path.join(folder, 'api')).filter(f => f.endsWith('.json')).sort()) {
  const name = file.replace('.json', '')
  await open()
  const target = path.join(folder, file)
  if (mode === 'lay-out') {
    const notes = JSON.parse(fs.readFileSync(new URL('./notes.json', import.meta.url)))
    await layOut(JSON.parse(fs.readFileSync(path.join(folder, 'api', file))), notes[name])
    const made = await page.evaluate(() => window.app.graph.serialize())
    fs.writeFileSync(target, JSON.stringify(made, null, 1) + '\n')
  }
  const workflow = JSON.parse(fs.readFileSync(target))
  const found = await page.evaluate(async workflow => {
    await window.app.loadGraphData(workflow)
    const nodes = window.app.graph.nodes
    const area = nodes.reduce((a, n) => [Math.min(a[0], n.pos[0]), Math.min(a[1], n.pos[1] - 40), Math.max(a[2], n.pos[0] + n.size[0]),
      Math.max(a[3], n.pos[1] + n.size[1])], [1e9, 1e9, -1e9, -1e9])
    const canvas = window.app.canvas
    const scale = Math.min((canvas.canvas.clientWidth - 120) / (area[2] - area[0]), (canvas.canvas.clientHeight - 130) / (area[3] - area[1]), 1)
    canvas.ds.scale = scale
    canvas.ds.offset = [80 / scale - area[0], 90 / scale - area[1]]
    canvas.min_font_size_for_lod = 0
    canvas.setDirty(true, true)
    await new Promise(r => setTimeout(r, 1500))
    return { nodes: nodes.length, missing: nodes.filter(n => !window.LiteGraph.registered_node_types[n.type]).map(n => n.type),
             errors: nodes.filter(n => n.has_errors).map(n => n.type) }
  }, workflow)
  await page.keyboard.press('Escape')
  await page.waitForTimeout(500)
  await page.screenshot({ path: path.join(out, `${name}.png`) })
  const badges = await page.locator('.p-dialog, .p-toast-message-error').allInnerTexts()
  const wrong = [...found.errors, ...errors, ...badges, ...await covered()]
  if (mode === 'run') {
    await run()
    await page.screenshot({ path: path.join(out, `${name}_done.png`) })
    wrong.push(...await page.locator('.p-dialog, .p-toast-message-error').allInnerTexts(), ...await covered())
    found.pictures = await page.evaluate(() => ['SaveImage', 'PreviewImage'].map(type => window.app.graph.nodes.filter(n => n.type === type)
      .map(n => window.app.nodeOutputs[n.id]?.images ?? []).filter(images => images.length)).find(nodes => nodes.length) ?? [])
  }
  report[name] = { ...found, errors: wrong }
}
await browser.close()
console.log(JSON.stringify(report))
